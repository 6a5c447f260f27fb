"""把写好的目录换到最终的位置：能原子地交换就交换，任何时候那里都有一个完整的目录。"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

#: 换不成原子的：文件系统不认这个标志，或内核没有这个调用。
_CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def swap(fresh: Path, out: Path, retired: Path) -> Path:
    """``fresh`` 换到 ``out``，``out`` 原来的换出来。

    Args:
        fresh: 写好的目录。
        out: 已有的目录，在同一个文件系统上。
        retired: 不能原子地交换时，原来的先改成这个名字；两次改名之间 ``out`` 不存在。

    Returns:
        原来的目录现在在哪里。

    Raises:
        OSError: 改不了名；``out`` 仍是原来的。
    """
    if _exchange(fresh, out):
        return fresh
    out.rename(retired)
    try:
        fresh.rename(out)
    except BaseException:
        retired.rename(out)
        raise
    return retired


def _exchange(first: Path, second: Path) -> bool:
    """``renameat2(RENAME_EXCHANGE)``；这里做不到返回 ``False``。"""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    if call(*paths, _RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
