"""pytest 插件：transformers 自己的测试里建起来的每个支持的模型，都先 ``apply`` 再交给测试。

``nox -s transformers_tests`` 用它；方案由环境变量 ``DSX_APPLY`` 给（``dsx`` 的方案名，可带 ``mla.form=absorb`` 之类，用空格隔开）。
装不上的模型原样交给测试，结束时按模型类与错误码数出来；哪个类建过却一个都没装上，就是失败。
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import transformers

import deepseek_export as dsx
from deepseek_export.integration.compat import model_classes
from deepseek_export.profile import resolve_profile

#: （模型类，装上了或是什么码）→ 几个。
OUTCOMES: Counter[tuple[str, str]] = Counter()
_APPLIED = "apply"


def pytest_configure(config: Any) -> None:
    """给模型类的 ``__init__`` 接上 ``apply``。"""
    name, *overrides = os.environ["DSX_APPLY"].split()
    profile = resolve_profile(name, overrides)
    for kind in model_classes():
        _wrap(getattr(transformers, kind), profile)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """装了几个，没装的是什么码。"""
    terminalreporter.section("dsx apply")
    for (kind, outcome), count in sorted(OUTCOMES.items()):
        terminalreporter.write_line(f"{kind} {outcome}：{count} 个模型")


def pytest_sessionfinish(session: Any) -> None:
    """哪个类一个都没装上，或根本没有建过模型，就是失败。"""
    built = {kind for kind, _ in OUTCOMES}
    if session.testscollected and (not built or any(not OUTCOMES[kind, _APPLIED] for kind in built)):
        session.exitstatus = 1


def _wrap(kind: Any, profile: dsx.OptimizationProfile) -> None:
    original = kind.__init__

    @functools.wraps(original)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        if type(self) is not kind:
            return
        try:
            dsx.apply(self, profile)
        except dsx.DsxError as error:
            OUTCOMES[kind.__name__, f"{error.code} {error.what}"] += 1
        else:
            OUTCOMES[kind.__name__, _APPLIED] += 1

    kind.__init__ = init
