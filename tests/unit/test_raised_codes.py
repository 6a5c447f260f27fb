"""错误码的完备性检查自己：什么时候查，什么算见到，什么时候失败；每次都是真的跑一遍 pytest。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

#: 只要求这两个码；``test_ids`` 触发前一个，后一个各测试自己安排。
CONFTEST = """
from pathlib import Path
from tests.raised_codes import RaisedCodes

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: 慢")
    codes = ("DSX-E701", "DSX-E509")
    config.pluginmanager.register(RaisedCodes(config, codes, Path(__file__).parent))
"""
HEAD = """
import pytest
from deepseek_export.cli.generate import parse_ids
from deepseek_export.errors import DsxError
from tests.raised_codes import saw

"""
IDS = """
def test_ids():
    with pytest.raises(DsxError):
        parse_ids("x")
"""
RAISED = """
def test_huge():
    with pytest.raises(DsxError):
        parse_ids("9" * 99)
"""
#: 写着码、造了错误，包却没有抛。
ONLY_NAMED = """
def test_huge():
    assert DsxError("DSX-E509", "道具", "无").code == "DSX-E509"
"""
XDIST = ("-p", "xdist", "-n", "2", "--dist", "loadfile")


def run(folder: Path, second: str, *args: str) -> tuple[int, str]:
    """两个测试文件的一套测试：``test_ids.py`` 与内容为 ``second`` 的 ``test_second.py``。"""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_ids.py").write_text(HEAD + IDS)
    (folder / "test_second.py").write_text(HEAD + second)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_codes_of_all_workers_count_together(tmp_path):
    code, text = run(tmp_path, RAISED, *XDIST)
    assert (code, "错误码：2 个里见到 2 个\n" in text) == (0, True), text


@pytest.mark.parametrize("args", [(), XDIST], ids=["one process", "xdist"])
def test_a_code_no_test_raises_fails_the_run(args, tmp_path):
    """包没有抛过的码，写在测试里、由测试自己造出来都不算。"""
    code, text = run(tmp_path, ONLY_NAMED, *args)
    assert (code, "见到 1 个；没有测试触发：DSX-E509\n" in text) == (1, True), text


def test_a_code_printed_by_a_checked_subprocess_counts(tmp_path):
    code, text = run(tmp_path, 'def test_huge():\n    saw("DSX-E509")\n')
    assert (code, "见到 2 个\n" in text) == (0, True), text


@pytest.mark.parametrize(
    ("mark", "args"), [("skip(reason='没有')", ()), ("slow", ("-m", "not slow"))], ids=["skipped", "slow"]
)
def test_a_test_that_did_not_run_excuses_its_codes(mark, args, tmp_path):
    code, text = run(tmp_path, f"@pytest.mark.{mark}\n{ONLY_NAMED.strip()}\n", *args)
    assert (code, "提到它的测试这次没有跑：DSX-E509\n" in text) == (0, True), text


@pytest.mark.parametrize(
    "args",
    [
        ("test_ids.py",),
        ("-k", "test_ids"),
        ("--deselect", "test_second.py::test_huge"),
        ("--collect-only",),
    ],
    ids=" ".join,
)
def test_a_partial_run_is_not_checked(args, tmp_path):
    code, text = run(tmp_path, ONLY_NAMED, *args)
    assert (code, "错误码：" in text) == (0, False), text


def test_a_failing_run_is_not_checked(tmp_path):
    code, text = run(tmp_path, "def test_huge():\n    assert False\n")
    assert (code, "错误码：" in text) == (1, False), text
