"""``perf.isolate`` 的测试在子进程里调用的函数；不导入任何重的东西。"""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def prepare(value: int) -> Callable[[], dict[str, int]]:
    """准备在这里，计时的是返回的函数。"""
    return lambda: {"value": value + 1}


class Counter:
    """一直开着的对象。"""

    def __init__(self, start: int) -> None:
        self._total = start

    def add(self, value: int) -> int:
        print("库往标准输出写的东西不该打断对话")
        if value < 0:
            raise ValueError("不要负数")
        self._total += value
        return self._total

    def environment(self, name: str) -> str:
        return os.environ[name]

    def die(self) -> None:
        os._exit(3)

    def hang(self) -> None:
        time.sleep(60)


class Refuses:
    """填不了缓存的引擎。"""

    def go_to(self, depth: int) -> None:
        raise MemoryError(f"填不下 {depth} 个")
