"""不可信的输入：不该当普通文件读的东西（读了会等到永远、吃光内存，或悄悄少一个文件），以及停不下来的模板。"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deepseek_export.runtime import chat_template

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


def hurried_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """聊天模板的 CPU 限额改成半秒，测试不必等满十秒；其余与真的一样。"""
    monkeypatch.setattr(chat_template, "WORKER", chat_template.ChatWorker(seconds=0.5))
