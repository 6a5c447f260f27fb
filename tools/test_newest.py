"""``make test-newest``：今天最新的依赖会弄坏什么。

另建一个环境（``build/newest-venv``），下限照 pyproject.toml，没有上限也不看锁，跑契约测试。有失败的，就把比锁新的包一个一个换回锁住的版本，
只重跑失败的那些：换回哪个就过了，就算在哪个头上；单换哪个都不过的另列一行。最后印一张表：包、锁住的、最新的、它弄坏的测试。

退出码：都通过为 0，有失败为 1。
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from tools.make_lock import ALONE, EXTRAS, ROOT, project_settings, read_lock

FOLDER = ROOT / "build/newest-venv"
REPORT = ROOT / "build/newest-tests.xml"
#: 平常跑哪些测试。
TESTS = ("tests/contract",)
#: 哪一个包也怪不上的。
TOGETHER = "（单独一个说明不了）"
_OWN = "deepseek-export"


def without_upper_bounds(requirement: str) -> str:
    """去掉一条依赖的上限，留下限与环境标记：``onnx>=1.20,<1.24; m`` → ``onnx>=1.20; m``。"""
    parsed = Requirement(requirement)
    parsed.specifier = SpecifierSet(",".join(str(one) for one in parsed.specifier if one.operator == ">="))
    return str(parsed)


def direct_requirements() -> list[str]:
    """pyproject.toml 直接写的依赖，除了装不到一起的那几组，都没有上限。"""
    settings = project_settings()
    extras, found = settings["optional-dependencies"], set(settings["dependencies"])
    groups = [*EXTRAS]
    for name in groups:
        for one in extras[name]:
            parsed = Requirement(one)
            if parsed.name == _OWN:  # 引用别的组
                groups += sorted(parsed.extras - set(groups))
            else:
                found.add(one)
    return sorted({without_upper_bounds(one) for one in found})


class Newest:
    """那个环境。

    Args:
        folder: 环境的目录；已经有就接着用。
    """

    def __init__(self, folder: Path) -> None:
        self._python = str(folder / "bin/python")
        if not Path(self._python).is_file():
            venv.create(folder, with_pip=True)

    def install(self, requirements: Sequence[str]) -> None:
        """装最新的一套，再装本项目（不带依赖，所以它写的上限不起作用）。"""
        self._pip("install", "--upgrade", "--upgrade-strategy", "eager", *requirements)
        self._pip("install", "--no-deps", "-e", str(ROOT))

    def versions(self) -> dict[str, str]:
        """装着的：包名 → 公开的版本。"""
        command = [self._python, "-m", "pip", "list", "--format", "json", "--exclude-editable"]
        listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return {canonicalize_name(one["name"]): one["version"].split("+")[0] for one in json.loads(listed)}

    def swap(self, name: str, version: str) -> bool:
        """换一个包的版本，别的不动；装不了为假。"""
        return self._pip("install", "--no-deps", f"{name}=={version}", check=False) == 0

    def failing(self, tests: Sequence[str]) -> list[str]:
        """跑测试，返回失败的（``文件::测试``）；连收集都失败的是文件名。

        Raises:
            SystemExit: pytest 没有留下结果。
        """
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.unlink(missing_ok=True)
        options = [
            "-n",
            "auto",
            "--dist",
            "loadfile",
            "-m",
            "not slow",
            "-q",
            "--continue-on-collection-errors",
        ]
        subprocess.run(
            [self._python, "-m", "pytest", *options, f"--junitxml={REPORT}", *tests], cwd=ROOT, check=False
        )
        if not REPORT.is_file():
            raise SystemExit("pytest 没有跑完，见上面的输出")
        return failed_tests(REPORT)

    def _pip(self, *arguments: str, check: bool = True) -> int:
        command = [self._python, "-m", "pip", *arguments, "--quiet"]
        return subprocess.run(command, cwd=ROOT, check=check).returncode


def failed_tests(report: Path) -> list[str]:
    """一份 JUnit 结果里失败与出错的测试，写成 pytest 认得的样子。"""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            continue
        where = case.get("classname", "")
        if not where:  # 收集时就失败了
            found.append(case.get("name", "").replace(".", "/") + ".py")
            continue
        found.append(f"{where.replace('.', '/')}.py::{case.get('name')}")
    return sorted(set(found))


def changed(locked: Mapping[str, str], newest: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """版本不同的包：包名 → ``(锁住的, 最新的)``；只有一边有的写成 ``—``。"""
    extras = project_settings()["optional-dependencies"]
    absent = {canonicalize_name(Requirement(one).name) for name in ALONE for one in extras[name]}
    names = {name for name in {*locked, *newest} - absent if locked.get(name) != newest.get(name)}
    return {name: (locked.get(name, "—"), newest.get(name, "—")) for name in sorted(names - {"pip"})}


def blame(
    environment: Newest, different: Mapping[str, tuple[str, str]], failing: Sequence[str]
) -> dict[str, list[str]]:
    """把失败算到包头上：包名 → 换回锁住的版本就通过的测试。"""
    found: dict[str, list[str]] = {}
    explained: set[str] = set()
    for name, (locked, newest) in different.items():
        if "—" in (locked, newest) or not environment.swap(name, locked):
            continue
        still = set(environment.failing(failing))
        found[name] = [test for test in failing if test not in still]
        explained |= set(found[name])
        environment.swap(name, newest)
    found[TOGETHER] = [test for test in failing if test not in explained]
    return found


def direct_versions(locked: Mapping[str, str], newest: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """直接写的依赖里装着的：包名 → ``(锁住的, 最新的)``。"""
    names = {canonicalize_name(Requirement(one).name) for one in direct_requirements()}
    return {name: (locked.get(name, "—"), newest[name]) for name in sorted(names & set(newest))}


def table(versions: Mapping[str, tuple[str, str]], blamed: Mapping[str, Iterable[str]]) -> Table:
    """结果的表，一行一个包：直接写的都列出来，间接的只列版本不同的。"""
    shown = Table("包", "锁住的", "最新的", "它弄坏的测试")
    rows = {**versions, **({TOGETHER: ("", "")} if blamed.get(TOGETHER) else {})}
    for name, pair in rows.items():
        shown.add_row(name, *pair, "\n".join(blamed.get(name, ())) or "没有")
    return shown


def main() -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(prog="python -m tools.test_newest", description=__doc__)
    parser.add_argument("tests", nargs="*", default=TESTS, help="跑哪些测试，缺省是全部契约测试")
    tests = parser.parse_args().tests
    console = Console()
    environment = Newest(FOLDER)
    environment.install(direct_requirements())
    locked, newest = read_lock(), environment.versions()
    different = changed(locked, newest)
    console.print(f"与锁不同的有 {len(different)} 个包：{'、'.join(different) or '没有'}")
    failing = environment.failing(tests)
    blamed = blame(environment, different, failing) if failing else {}
    console.print(table(direct_versions(locked, newest) | different, blamed))
    console.print(f"失败 {len(failing)} 个" if failing else "全部通过")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
