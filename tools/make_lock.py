"""锁：``make lock`` 按 pyproject.toml 的范围解出今天最新的一套版本，写进 ``constraints.txt``。

``make``、``.ci/run``、Dockerfile 与文档里装检出的命令都带 ``-c constraints.txt``，所以哪天装都是同一套；别人装 wheel 得到的是范围。
锁只在这里改：升级就是再跑一次 ``make lock``，跑完 ``make test`` 一起提交。
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
#: 这几组合起来就是全部能一起装的依赖。
EXTRAS = ("dev", "kernels", "peers", "perf", "rtx")
#: 与上面的装不到一起，或这里装不了：只解它们自己，各自的依赖由它们写死。
ALONE = ("gpu", "tensorrt")
#: 锁成一段而不是一个：PyPI 上 CUDA 的 torch 2.13 写死 triton 3.7.1，CPU 的 torch 不带 triton，装得上最新的。
SPANS = {"triton": "3.7.1"}
_HEADER = """\
# 由 make lock 写，不要手改；每一行都在 pyproject.toml 的范围之内。
# make、.ci/run、Dockerfile 与文档里装检出的命令都用它：pip install -c constraints.txt -e '.[hf]'
"""
_OWN = "deepseek-export"


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """锁住的版本：包名 → 版本；锁成一段的是上端。"""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [re.split("==|>=.*<=", line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def project_settings() -> dict[str, Any]:
    """pyproject.toml 的 ``[project]``。"""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["project"]


def resolved(*requirements: str) -> dict[str, str]:
    """pip 会装的一套：包名 → 公开的版本（没有 ``+cpu`` 之类的本地后缀，在别的机器上才对得上）。

    Args:
        requirements: 交给 ``pip install --dry-run`` 的参数。

    Raises:
        subprocess.CalledProcessError: 解不出来；pip 的话已经印在屏幕上。
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    done = subprocess.run(
        [*command, "--report", "-", *requirements], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    chosen = [one["metadata"] for one in json.loads(done.stdout)["install"]]
    return {canonicalize_name(one["name"]): one["version"].split("+")[0] for one in chosen}


def _locked(name: str, version: str) -> str:
    return f"{name}>={SPANS[name]},<={version}" if name in SPANS else f"{name}=={version}"


def main() -> None:
    """命令行入口。"""
    extras = project_settings()["optional-dependencies"]
    alone = [one for name in ALONE for one in extras[name] if not one.startswith(_OWN)]
    found = resolved("-e", f".[{','.join(EXTRAS)}]")
    found |= resolved("--no-deps", *alone)
    found.pop(_OWN, None)
    body = "".join(f"{_locked(name, version)}\n" for name, version in sorted(found.items()))
    LOCK.write_text(_HEADER + body, encoding="utf-8")
    print(f"{LOCK.name}：{len(found)} 个包")


if __name__ == "__main__":
    main()
