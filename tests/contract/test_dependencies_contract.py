"""依赖的范围与锁（EXPORT-43）：哪天在全新的机器上装，都是试过的那一套。"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.make_lock import LOCK, ROOT, project_settings, read_lock
from tools.test_newest import (
    TOGETHER,
    blame,
    changed,
    direct_requirements,
    failed_tests,
    table,
    without_upper_bounds,
)

pytestmark = pytest.mark.contract

OWN = "deepseek-export"
UPPER = {"<", "<=", "=="}


def declared() -> list[Requirement]:
    """pyproject.toml 写的每条依赖，本项目自己的组除外。"""
    settings = project_settings()
    groups = [settings["dependencies"], *settings["optional-dependencies"].values()]
    found = [Requirement(one) for group in groups for one in group]
    return [one for one in found if one.name != OWN]


def test_every_dependency_has_both_bounds():
    """EXPORT-43：日期作版本号的 packaging 例外，它没有大版本。"""
    lower = [str(one) for one in declared() if not any(bound.operator == ">=" for bound in one.specifier)]
    upper = [str(one) for one in declared() if not UPPER & {bound.operator for bound in one.specifier}]
    assert (lower, upper) == ([], ["packaging>=24"])


def test_the_lock_lies_within_the_ranges():
    """EXPORT-43：锁里每个直接依赖都在范围之内，没有只在本机装得上的版本（``+cpu``）。"""
    locked = read_lock()
    outside = [
        str(one) for one in declared() if not one.specifier.contains(locked[canonicalize_name(one.name)])
    ]
    assert outside == []
    assert "+" not in LOCK.read_text(encoding="utf-8").split("\n", 2)[2]


def test_every_install_of_a_checkout_uses_the_lock():
    """EXPORT-43：Makefile、noxfile、Dockerfile、文档里，装检出的命令都带着锁。"""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = re.compile(r"(^|/)(Makefile|Dockerfile[\w.]*|README[\w.]*\.md|docs/[\w.-]+\.md)$")
    loose, seen = [], 0
    for name in filter(named.search, listed.stdout.splitlines()):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            for command in re.findall(r"(?:pip install|INSTALL\)) [^`|&#]*", line):
                if not re.search(r"-e |'?\.\[|whl\)\[", command):  # 装的是发布的 wheel
                    continue
                seen += 1
                if "-c " not in command and "INSTALL)" not in command:
                    loose.append(f"{name}: {command}")
    assert loose == []
    assert seen > 10


def test_the_canary_takes_only_the_upper_bounds_away():
    """EXPORT-43：下限、extras 与环境标记照旧。"""
    assert without_upper_bounds("onnx>=1.20,<1.24") == "onnx>=1.20"
    marked = without_upper_bounds("ray[serve]>=2.50,!=2.51,<3; sys_platform == 'linux'")
    assert marked == 'ray[serve]>=2.50; sys_platform == "linux"'
    everything = [Requirement(one) for one in direct_requirements()]
    assert {one.name for one in everything} > {"torch", "transformers", "fastapi", "triton", "pytest"}
    assert {bound.operator for one in everything for bound in one.specifier} == {">="}


class Room:
    """一个装着 ``installed`` 的环境：``breaks`` 是弄坏测试的版本组合。"""

    def __init__(self, installed: dict[str, str], breaks: dict[str, set[tuple[str, str]]]) -> None:
        self.installed, self.breaks = dict(installed), breaks

    def swap(self, name: str, version: str) -> bool:
        self.installed[name] = version
        return True

    def failing(self, tests) -> list[str]:
        return [one for one in tests if self.breaks[one] <= set(self.installed.items())]


def test_a_failure_is_blamed_on_the_package_that_causes_it():
    """EXPORT-43：换回锁住的版本就过的，算在它头上；要两个一起才坏的，两个都算；哪个也不怪的另列一行。"""
    locked, newest = {"a": "1", "b": "1", "c": "1"}, {"a": "2", "b": "2", "c": "1", "d": "9"}
    different = changed(locked, newest)
    assert different == {"a": ("1", "2"), "b": ("1", "2"), "d": ("—", "9")}
    breaks = {"t::a": {("a", "2")}, "t::ab": {("a", "2"), ("b", "2")}, "t::d": {("d", "9")}}
    room = Room(newest, breaks)
    found = blame(room, different, room.failing([*breaks]))
    assert found == {"a": ["t::a", "t::ab"], "b": ["t::ab"], TOGETHER: ["t::d"]}
    assert room.installed == newest
    assert table(different, found).row_count == 4


def test_failed_tests_are_named_as_pytest_names_them(tmp_path: Path):
    """EXPORT-43：真的跑一遍：失败的、出错的与收集不了的。"""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").touch()
    (tmp_path / "pkg/test_one.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', [1, 2])\ndef test_n(n):\n    assert n == 1\n"
    )
    (tmp_path / "pkg/test_two.py").write_text("import no_such_module\n")
    report = tmp_path / "out.xml"
    command = ["pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run(
        [sys.executable, "-m", *command, f"--junitxml={report}", "pkg"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
    )
    assert failed_tests(report) == ["pkg/test_one.py::test_n[2]", "pkg/test_two.py"]
