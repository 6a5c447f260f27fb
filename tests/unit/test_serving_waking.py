"""引擎的线程叫醒事件循环。"""

from __future__ import annotations

import asyncio
import gc
import weakref
from unittest import mock

import pytest

from deepseek_export.serving.http.waking import waker_of

pytestmark = pytest.mark.unit


def test_a_step_wakes_the_loop_once() -> None:
    """循环还没有来得及醒，后面的就不再叫；醒来一个不少，之后又能叫。"""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        waker = waker_of(loop)
        assert waker_of(loop) is waker
        events = [asyncio.Event() for _ in range(8)]

        def step() -> None:
            for event in (*events, events[0]):
                waker.set(loop, event)

        for _ in range(3):
            with mock.patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as call:
                step()
            assert call.call_count == 1
            async with asyncio.timeout(20):
                for event in events:
                    await event.wait()
                    event.clear()
            await asyncio.to_thread(step)
            async with asyncio.timeout(20):
                for event in events:
                    await event.wait()
                    event.clear()

    asyncio.run(run())


def test_closed_loops_are_left_alone() -> None:
    """循环关了没有人要听：什么也不做，也不留着它。"""
    loop = asyncio.new_event_loop()
    waker, event = waker_of(loop), asyncio.Event()
    loop.close()
    waker.set(loop, event)
    assert not event.is_set()
    kept = weakref.ref(waker)
    del loop, waker
    gc.collect()
    assert kept() is None
