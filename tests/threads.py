"""服务引擎的线程：谁开的谁关，留下的连累后面的测试。"""

from __future__ import annotations

import threading
import time


def engine_threads() -> set[threading.Thread]:
    """现在有哪些。"""
    return {thread for thread in threading.enumerate() if thread.name == "dsx-engine"}


def left_behind(before: set[threading.Thread], seconds: float = 20.0) -> set[threading.Thread]:
    """``before`` 之外还有哪些；正在停的等它停完。"""
    deadline = time.monotonic() + seconds
    while (left := engine_threads() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
