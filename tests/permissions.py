"""测试常以 root 跑，root 不受文件权限约束：期间放下这项特权，权限就照常起作用。"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import pytest

_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2


@contextlib.contextmanager
def permissions_apply() -> Iterator[None]:
    """当前线程（root 也一样）读写没有权限的文件会被拒绝。"""
    if sys.platform != "linux":
        pytest.skip("要 Linux 的 capset")
    libc = ctypes.CDLL(None, use_errno=True)
    header, caps = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, caps) == 0
    before = caps[0]
    caps[0] = before & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    assert libc.capset(header, caps) == 0
    try:
        yield
    finally:
        caps[0] = before
        assert libc.capset(header, caps) == 0
