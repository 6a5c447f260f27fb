"""用户给的路径：动工之前先看那里是什么；看不了的、不是 UTF-8 的，按码拒绝。"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from deepseek_export.errors import DsxError

PathKind = Literal["directory", "file", "other", "missing"]


def path_kind(path: Path, code: str) -> PathKind:
    """``path`` 是什么；符号链接看它指向的。

    ONNX、tokenizers 的库与 JSON 只认 UTF-8 的路径，不是的在这里就拒绝，免得做到一半才出错。

    Args:
        path: 任意路径。
        code: 看不了的时候用哪个码。

    Raises:
        DsxError: ``code``，路径不是合法的 UTF-8，或看不了：没有权限、名字太长、上级是文件、链接成环。
    """
    try:
        os.path.abspath(path).encode()
        mode = None if "\0" in str(path) else os.stat(path).st_mode
    except UnicodeEncodeError:
        mode = None
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise DsxError(code, f"{path}：{error.strerror}", "检查路径与权限") from error
    if mode is None:
        shown = str(path).replace("\0", "\\0").encode(errors="backslashreplace").decode()
        raise DsxError(code, f"路径 {shown} 不是合法的 UTF-8 文本", "改名，或换一个 UTF-8 的路径")
    return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def check_readable(path: Path, code: str, todo: str) -> None:
    """``path`` 打得开吗；不读内容。

    Raises:
        DsxError: ``code``，打不开，附 ``todo``。
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise DsxError(code, f"打不开 {path}：{error.strerror}", todo) from error
