"""占住一个输出位置：同时只有一个 dsx 在写它。

锁是旁边一个文件上的 ``flock``：进程一死（``kill -9`` 也一样）内核就放开，留下的文件不拦任何人，下一个接着用、用完删掉。
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from deepseek_export.errors import DsxError

#: 有的网络文件系统没有 flock。
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def lock_file(out: Path) -> Path:
    """``out`` 的锁文件，在它旁边。"""
    return out.with_name(f".{out.name}.lock")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """占住 ``out``；别人占着就立即拒绝，不等。同一个进程的另一个线程也是别人。

    Args:
        out: 绝对路径，可以还不存在；上级目录没有就建，退出时还空着就删，没有占成也一样。

    Raises:
        DsxError: ``DSX-E411`` 别人正在写，附是谁；``DSX-E405`` 文件系统没有锁。
        OSError: 上级目录不可写，或磁盘满了。
    """
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        file = _acquire(out)
        try:
            yield
        finally:
            _release(file, out)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _release(file: int, out: Path) -> None:
    """先删再放开：反过来的话，删掉的可能是下一个人刚锁上的。"""
    if _is_at(file, lock_file(out)):
        lock_file(out).unlink()
    os.close(file)


def _acquire(out: Path) -> int:
    path = lock_file(out)
    while True:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # 刚建的上级目录被另一个正在退出的删了
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                _sign(file, path)
                return file
        except BlockingIOError as error:
            holder = _holder(file)
            os.close(file)
            raise DsxError(
                "DSX-E411", f"{out} 正由{holder}写", "等它写完再来；或停掉它，或换一个输出位置"
            ) from error
        except OSError as error:
            os.close(file)
            if error.errno not in _NO_LOCKS:
                raise
            raise DsxError(
                "DSX-E405",
                f"{path}：这个文件系统没有文件锁（{error.strerror}），两个 dsx 会互相覆盖",
                "先写到有 flock 的文件系统（本地磁盘），再整个目录移过去",
            ) from error
        os.close(file)  # 锁上的是前一个人已经删掉的文件：重来


def _sign(file: int, path: Path) -> None:
    """写上谁占着；磁盘满了写不下，就不留下空的锁文件（锁还在手上，删得）。"""
    try:
        os.truncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _is_at(file: int, path: Path) -> bool:
    """``path`` 现在就是打开着的 ``file`` 吗。"""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(file: int) -> str:
    """锁文件里写着谁占着；它刚锁上、还没来得及写的时候不知道。"""
    try:
        who = json.loads(os.pread(file, 4096, 0))
        return f" {who['host']} 上的进程 {who['pid']} "
    except (ValueError, KeyError, TypeError):
        return "另一个进程"
