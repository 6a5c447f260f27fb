"""用户给的路径：动工之前先看那里是什么；看不了的、不是 UTF-8 的，按码拒绝。

读文件只走这里：必须是普通文件（管道会等到永远，``/dev/zero`` 没有尽头），大小先看再读。
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from deepseek_export.errors import DsxError

PathKind = Literal["directory", "file", "other", "missing"]

#: 一个 JSON、TOML 或模板文件至多这么大；本来就大的（分词器、索引、manifest）用 :data:`MAX_LARGE_TEXT`。
MAX_TEXT = 8 << 20
#: 已知最大的分词器与索引都在 40 MiB 以内。
MAX_LARGE_TEXT = 256 << 20


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


def optional_file(path: Path, code: str) -> bool:
    """可有可无的文件在不在。

    Raises:
        DsxError: ``code``，在，却不是普通文件：当作没有会悄悄少一样东西；或看不了。
    """
    kind = path_kind(path, code)
    if kind != "file" and (kind != "missing" or path.is_symlink()):
        names = {"directory": "目录", "missing": "断了的符号链接"}
        what = names.get(kind, "管道、设备之类的特殊文件")
        raise DsxError(code, f"{path} 是{what}，不是普通文件", "换成普通文件；不需要的话移走")
    return kind == "file"


def open_regular(path: Path) -> BinaryIO:
    """打开一个普通文件来读；不会等在管道上。

    Raises:
        OSError: 打不开，或不是普通文件；``strerror`` 说明原因。
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # 看的是打开了的这一个：按路径再看一次，可能已经换成了别的。
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "不是普通文件", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """整个读一个不大的普通文件。

    Args:
        path: 文件。
        limit: 至多多少字节；更大的不读。

    Raises:
        OSError: 打不开、不是普通文件或太大；``strerror`` 说明原因。
    """
    with open_regular(path) as file:
        return read_open(file, limit)


def read_open(file: BinaryIO, limit: int) -> bytes:
    """整个读 :func:`open_regular` 打开的文件；参数与异常同 :func:`read_regular`。"""
    found = os.fstat(file.fileno()).st_size
    if found > limit:
        raise OSError(errno.EFBIG, f"有 {found:,} 字节，这种文件至多 {limit:,}")
    content = file.read(found + 1)
    if len(content) != found:
        raise OSError(errno.ESTALE, f"读的时候变了：原有 {found:,} 字节")
    return content


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """读一个不大的 UTF-8 文本文件；参数同 :func:`read_regular`。

    Raises:
        OSError: 同 :func:`read_regular`。
        UnicodeDecodeError: 不是 UTF-8。
    """
    return read_regular(path, limit).decode("utf-8")


def check_readable(path: Path, code: str, todo: str) -> None:
    """``path`` 是打得开的普通文件吗；不读内容。

    Raises:
        DsxError: ``code``，不是，附 ``todo``。
    """
    try:
        open_regular(path).close()
    except OSError as error:
        raise DsxError(code, f"打不开 {path}：{error.strerror}", todo) from error
