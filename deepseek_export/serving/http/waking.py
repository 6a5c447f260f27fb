"""引擎的线程叫醒事件循环：一步里有几个请求来了新 token，只叫一次。

``call_soon_threadsafe`` 每次都要写一个管道、与事件循环争解释器的锁；攒在一起，一步就只有一次。
"""

from __future__ import annotations

import asyncio
import threading
from weakref import WeakKeyDictionary


class LoopWaker:
    """一个事件循环一个，见 :func:`waker_of`。"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[asyncio.Event, None] = {}

    def set(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """在 ``loop`` 里 ``event.set()``；哪个线程都可以。循环已经关了就什么也不做：没有人要听。"""
        with self._lock:
            first = not self._due
            self._due[event] = None
        if first and not loop.is_closed():
            loop.call_soon_threadsafe(self._fire)

    def _fire(self) -> None:
        with self._lock:
            due, self._due = self._due, {}
        for event in due:
            event.set()


_WAKERS: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker] = WeakKeyDictionary()


def waker_of(loop: asyncio.AbstractEventLoop) -> LoopWaker:
    """``loop`` 的那一个；在它的线程里调。"""
    return _WAKERS.setdefault(loop, LoopWaker())
