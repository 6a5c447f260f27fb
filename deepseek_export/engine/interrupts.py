"""TensorRT 干活时的 Ctrl-C 与 SIGTERM：它从 C++ 里回调 Python，信号的异常恰好在回调里抛出就被它吞掉，引擎照建，退出码是 0。"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """其间的 SIGINT、SIGTERM 先记下，离开时再交给原来的处理者，期间抛出的异常让位给它；再来一次则立即结束进程。

    不叫停 TensorRT：让进度的回调返回 ``False``，TensorRT-RTX 1.7 会破坏堆，进程以 SIGABRT 结束。信号只到主线程，在别的线程里什么也不做。

    Yields:
        收到过没有。
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # 忽略的仍旧忽略；None 是别的语言装的处理者，Python 装不回去。
    ours = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in ours:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
