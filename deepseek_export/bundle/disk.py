"""磁盘：原子地产生一个目录，写满时给出明确的错误。"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepseek_export.errors import DsxError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: 权重之外的文件（图、tokenizer、报告）至多这么大，预检时一并留出。
_HEADROOM = 64 << 20

#: bundle 的自述；没有它的目录不是 bundle。
MANIFEST = "manifest.json"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """把写满、无权限翻译成 ``DSX-E404`` / ``DSX-E405``。"""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DsxError(
                "DSX-E404", f"写 {path} 时：{error.strerror}", "清理磁盘，或把 -o 指向空间足够的位置"
            ) from error
        raise DsxError("DSX-E405", f"{path}：{error.strerror}", "检查路径与权限，换一个可写的 -o") from error


def check_free_space(directory: Path, needed: int) -> None:
    """开工之前先核对磁盘空间。

    Args:
        directory: 已存在的目录。
        needed: 权重的字节数。

    Raises:
        DsxError: ``DSX-E404``。
    """
    free = shutil.disk_usage(directory).free
    if free < needed + _HEADROOM:
        raise DsxError(
            "DSX-E404",
            f"{directory} 剩余 {free / 1e9:.2f} GB，导出需要约 {(needed + _HEADROOM) / 1e9:.2f} GB",
            "清理磁盘，或把 -o 指向空间足够的位置",
        )


def check_output(out: Path, overwrite: bool, marker: str = MANIFEST) -> None:
    """输出目录能不能用。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的。
        marker: 同类的目录里一定有的文件；没有它的目录任何时候都不替换。

    Raises:
        DsxError: ``DSX-E401``，已存在而不许替换，或存在的不是同类。
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DsxError("DSX-E401", f"{out} 已存在", "换一个 -o，或加 --overwrite 替换它")
    if not (out / marker).is_file():
        raise DsxError("DSX-E401", f"{out} 已存在，里面没有 {marker}，不是 dsx 写的，不会替换它", "换一个 -o")


@contextlib.contextmanager
def atomic_directory(out: Path, overwrite: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """在旁边的临时目录里写，全部完成后改名。

    中途出错（含 Ctrl-C）则删除临时目录；进程被 SIGKILL 时残留的临时目录由下一次导出清掉。任何时候 ``out`` 要么不存在、
    要么是原来的、要么是完整的新内容。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的。
        marker: 见 :func:`check_output`。

    Yields:
        临时目录。

    Raises:
        DsxError: ``DSX-E401`` 目标已存在；``DSX-E405`` 目标不可写。
    """
    out = out.absolute()
    check_output(out, overwrite, marker)
    prefix = f".{out.name}.tmp-"
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f"{prefix}*"):
            if not _alive(stale.name.removeprefix(prefix)):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = out.parent / f"{prefix}{os.getpid()}"
        temporary.mkdir()
    try:
        yield temporary
        with disk_errors(out):
            if out.exists():
                retired = out.parent / f"{prefix}{os.getpid()}.old"
                out.rename(retired)
                temporary.rename(out)
                shutil.rmtree(retired)
            else:
                temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sha256_file(path: Path) -> str:
    """文件内容的 sha256（十六进制）。"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _alive(pid: str) -> bool:
    pid = pid.removesuffix(".old")
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
