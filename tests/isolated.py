"""``perf.isolate`` 的测试在子进程里调用的函数；不导入任何重的东西。"""

from __future__ import annotations

from collections.abc import Callable


def prepare(value: int) -> Callable[[], dict[str, int]]:
    """准备在这里，计时的是返回的函数。"""
    return lambda: {"value": value + 1}
