"""磁盘缓存：算起来要好几秒、而结果由输入完全决定的东西（捕获的计算图），下次不必重算。

缓存只影响快慢，不影响结果：键是全部输入的摘要，条目自带 sha256（连同键，放错了名字的也认得出），读到损坏的当作没有；目录不可写就不存。
位置是 ``$XDG_CACHE_HOME/dsx``（缺省 ``~/.cache/dsx``），整个删掉随时可以；``DSX_NO_CACHE=1`` 既不读也不写。
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from deepseek_export.paths import MAX_LARGE_TEXT, read_regular

#: 一类条目至多留这么多个，再多就删最久没用过的。
MAX_ENTRIES = 512


def cache_home() -> Path:
    """dsx 放缓存的地方，不一定存在。"""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsx"


class DiskCache:
    """一类条目的缓存。

    Args:
        kind: 子目录的名字。
        max_entries: 至多留几个条目。
    """

    def __init__(self, kind: str, max_entries: int = MAX_ENTRIES) -> None:
        self._kind = kind
        self._max_entries = max_entries

    @property
    def directory(self) -> Path | None:
        """条目所在的目录，不一定存在；缓存关掉时为 ``None``。"""
        if os.environ.get("DSX_NO_CACHE", "0") != "0":
            return None
        return cache_home() / self._kind

    def get(self, key: str) -> bytes | None:
        """``key`` 的内容；没有、读不了、不是普通文件、太大、损坏都是 ``None``。

        Args:
            key: 全部输入的十六进制摘要。
        """
        if self.directory is None:
            return None
        path = self.directory / key
        try:
            digest, _, content = read_regular(path, MAX_LARGE_TEXT).partition(b"\n")
            path.touch()  # 删旧条目时看的是最近一次用到的时间
        except OSError:
            return None
        return content if digest == _digest(key, content) else None

    def put(self, key: str, content: bytes) -> None:
        """存下 ``content``；写到一半被杀掉也不留半个条目。"""
        directory = self.directory
        if directory is None:
            return
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            descriptor, scratch = tempfile.mkstemp(dir=directory, prefix=".")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_digest(key, content) + b"\n" + content)
                os.replace(scratch, directory / key)
            except BaseException:
                os.unlink(scratch)
                raise
            self._prune(directory)

    def _prune(self, directory: Path) -> None:
        entries = [path for path in directory.iterdir() if not path.name.startswith(".")]
        if len(entries) > self._max_entries:
            entries.sort(key=lambda path: path.lstat().st_mtime)
            for path in entries[: -self._max_entries]:
                with contextlib.suppress(OSError):  # 别的进程刚删掉，或者根本不是文件
                    path.unlink()


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
