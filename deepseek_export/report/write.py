"""把一页写到用户说的地方：先看写不写得下，写就写整个，不替换别人的文件。"""

from __future__ import annotations

import os
from pathlib import Path

from deepseek_export.bundle.disk import disk_errors, replace_text
from deepseek_export.errors import DsxError
from deepseek_export.paths import open_regular, path_kind
from deepseek_export.report.page import GENERATOR, Page, render

#: 页的身份写在这么多字节以内。
_HEAD_BYTES = 1024


def check_target(path: Path) -> None:
    """动手之前：``path`` 写得下、替换得了；要量好几分钟的，不该量完才说。

    Raises:
        DsxError: ``DSX-E405``，上级目录不在或不让进；``DSX-E401``，那里已有的不是 dsx 写的页。
    """
    todo = "换一个文件名，或把它移开"
    if path_kind(path.parent, "DSX-E405") != "directory":
        raise DsxError("DSX-E405", f"{path.parent} 不是目录", "先建好它，或换一个位置")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DsxError("DSX-E405", f"{path.parent} 不让写", "检查权限，或换一个位置")
    kind = path_kind(path, "DSX-E405")
    if kind == "missing" and not path.is_symlink():
        return
    if kind != "file" or path.is_symlink():
        raise DsxError("DSX-E401", f"{path} 已存在，不是普通文件，不会替换它", todo)
    with disk_errors(path), open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
    if GENERATOR.encode() not in head:
        raise DsxError("DSX-E401", f"{path} 已存在，不是 dsx 写的页，不会替换它", todo)


def write_page(path: Path, page: Page) -> None:
    """渲染好才写；写不下就不留文件，上一次的也还在。

    Raises:
        DsxError: 同 :func:`check_target`；``DSX-E404`` 磁盘满。
    """
    text = render(page)
    check_target(path)
    replace_text(path, text)
