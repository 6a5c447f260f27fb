"""不该当普通文件读的东西：读了会等到永远、吃光内存，或悄悄少一个文件。"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

KINDS = ("directory", "fifo", "device", "dangling", "huge")


def make_odd(path: Path, kind: str) -> None:
    """把 ``path`` 换成 ``kind``，原来有什么都删掉。"""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # 稀疏文件，不占磁盘
