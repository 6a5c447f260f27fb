"""pytest 插件：整套测试跑完，``errors.py`` 表里的每个码都要由包自己造出过。

看的是运行时：本进程里包造出的每个 :class:`DsxError`，和子进程里 dsx 印出来、测试核对过的码（:func:`saw`）。测试自己拿来当道具的不算。
只跑一部分时不查：有文件没有收集到、有 slow 之外的测试没有选中、有测试失败，都不是整套。没有跑的测试（slow、跳过的）提到的码也不要求，只写明。
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from deepseek_export.errors import DsxError

_SEEN: set[str] = set()


def saw(code: str) -> None:
    """子进程里的 dsx 以这个码拒绝了。"""
    _SEEN.add(code)


class RaisedCodes:
    """一次运行里见过的码；xdist 的各个 worker 各记各的，结束时交给主进程合起来。

    Args:
        config: 这次运行。
        codes: 都要见到的码。
        tests: 测试目录；里面每个 ``test_*.py`` 都收集到了才是整套。
    """

    def __init__(self, config: pytest.Config, codes: Collection[str], tests: Path) -> None:
        self.config, self.codes, self.tests = config, codes, tests
        self.not_run: set[str] = set()
        self.whole = False
        self.deselected: list[pytest.Item] = []
        self.verdict: str | None = None

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """``-m``、``-k``、``--lf``、``--deselect`` 去掉的。"""
        self.deselected += items

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """看这次是不是整套。"""
        files = {item.path for item in (*session.items, *self.deselected)}
        only_slow = all(item.get_closest_marker("slow") for item in self.deselected)
        self.whole = only_slow and files >= set(self.tests.rglob("test_*.py"))
        for item in self.deselected:
            self.not_run |= _named(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Iterator[None]:
        """测试期间记下包造出的每个错误。"""
        with mock.patch.object(DsxError, "__init__", _recording(DsxError.__init__)):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """跳过的测试触发不了它的码。"""
        report = yield
        if report.skipped:
            self.not_run |= _named(item)
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """主进程收下一个 worker 记的。"""
        found = getattr(node, "workeroutput", {}).get("raised_codes")
        if found is not None:  # 中途死掉的 worker 没有；那样的运行本来就是失败
            _SEEN.update(found["seen"])
            self.not_run.update(found["not_run"])
            self.whole |= found["whole"]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """整套都通过了，还有码没见到，就算失败。"""
        if hasattr(self.config, "workeroutput"):
            found = {"seen": sorted(_SEEN), "not_run": sorted(self.not_run), "whole": self.whole}
            self.config.workeroutput["raised_codes"] = found
            return
        if not self.whole or exitstatus != pytest.ExitCode.OK or self.config.option.collectonly:
            return
        unseen = set(self.codes) - _SEEN
        excused = unseen & self.not_run
        self.verdict = f"错误码：{len(self.codes)} 个里见到 {len(self.codes) - len(unseen)} 个"
        if excused:
            self.verdict += f"；提到它的测试这次没有跑：{'、'.join(sorted(excused))}"
        if missing := unseen - excused:
            self.verdict += f"；没有测试触发：{'、'.join(sorted(missing))}"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """查过就说一声，免得哪天悄悄不查了。"""
        if self.verdict is not None:
            terminalreporter.write_line(self.verdict)


def _recording(build: Callable[..., None]) -> Callable[..., None]:
    def record(error: DsxError, *arguments: Any, **options: Any) -> None:
        build(error, *arguments, **options)
        maker = inspect.currentframe().f_back.f_globals["__name__"]  # type: ignore[union-attr]
        if maker.partition(".")[0] == "deepseek_export":
            _SEEN.add(error.code)

    return record


def _named(item: pytest.Item) -> set[str]:
    """测试函数的源码里写着的码。"""
    function = getattr(item, "function", None)
    return set() if function is None else set(re.findall(r"DSX-E\d+", inspect.getsource(function)))
