"""装什么、装几层、版本从哪里来；真的构建 wheel 的在 tests/integration/test_wheel.py。"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from deepseek_export.version import __version__

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def installed_by(target: str) -> list[str]:
    """在全新的检出里 ``make target`` 会依次装哪几组。"""
    if shutil.which("make") is None:
        pytest.skip("没有 make")
    command = ["make", "--dry-run", "--always-make", "VENV=build/no-such-venv", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"pip install -c constraints\.txt -e '\.\[([\w,]+)\]'", done.stdout)


@pytest.mark.parametrize(
    ("target", "extras"), [("demo", ["export,serve"]), ("test", ["export,serve", "dev"])]
)
def test_the_demo_installs_no_developers_tools(target: str, extras: list[str]) -> None:
    """``make demo`` 只装运行（最后开的服务也是）与导出要的；``make test`` 再加上开发要的。"""
    assert installed_by(target) == extras


def test_the_version_is_written_once() -> None:
    """CPU-20：pyproject.toml 不写版本，只指向 version.py；也没有不存在的网址。"""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    source = (ROOT / settings["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [__version__]
    assert "urls" not in settings["project"]
