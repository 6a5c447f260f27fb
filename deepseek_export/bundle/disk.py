"""磁盘：原子地产生一个目录，被杀之后能接着写，写满时给出明确的错误。"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from deepseek_export.bundle.manifest import FileEntry
from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind
from deepseek_export.plan.written import HEADROOM
from deepseek_export.progress import Progress
from deepseek_export.units import size

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: 临时目录里写了一半的权重，以及记着写到哪里的日志；有日志的才会被下一次导出接着写。
WEIGHTS_FOLDER, JOURNAL_FILE = "weights", ".resume.json"

#: 换上新内容时，旧的先改成这个名字。
_RETIRED = ".old"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """把写满、无权限翻译成 ``DSX-E404`` / ``DSX-E405``。"""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = f"写 {path} 时：{error.strerror}"
            raise DsxError("DSX-E404", what, "清理磁盘，或换到空间足够的位置") from error
        where = error.filename if isinstance(error.filename, str) else path
        what = f"{where}：{error.strerror}"
        raise DsxError("DSX-E405", what, "检查路径与权限，或换到可写的位置") from error


def output_path(out: Path | str) -> Path:
    """消去中间的 ``..``：``a/../b`` 里的 ``a`` 不必存在，也不该为它建目录。

    ``a`` 是符号链接时照文件系统的意思来；没有中间的 ``..`` 就原样返回，相对路径还是相对的。
    """
    out = Path(out)
    return out if Path(os.path.normpath(out)) == out else Path(os.path.realpath(out))


def check_free_space(out: Path, needed: int) -> None:
    """开工之前先核对磁盘空间；上一次写了一半、这一次会接着写的不重复要。

    Args:
        out: 输出目录，可以还不存在。
        needed: 要写的权重的字节数；其余文件另留 :data:`~deepseek_export.plan.written.HEADROOM`。

    Raises:
        DsxError: ``DSX-E404``。
    """
    out = out.absolute()
    existing = next(path for path in (out, *out.parents) if path.is_dir())
    for stale in _stale(out):
        if _is_half_written(stale):
            needed -= sum(file.stat().st_size for file in (stale / WEIGHTS_FOLDER).glob("*"))
    free, wanted = shutil.disk_usage(existing).free, needed + HEADROOM
    if free < wanted:
        raise DsxError(
            "DSX-E404",
            f"{existing} 剩余 {size(free)}，需要约 {size(wanted)}，还差 {size(wanted - free)}",
            "清理磁盘，或换到空间足够的位置",
        )


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """硬链接；跨文件系统才复制。两边的内容以后都不就地改写，才能这样用。

    Raises:
        DsxError: ``DSX-E404``，要复制而空间不够。
    """
    try:
        os.link(source, target)
    except OSError:
        check_free_space(Path(target).parent, Path(source).stat().st_size)
        shutil.copyfile(source, target)


def check_output(out: Path, overwrite: bool, marker: str = "manifest.json") -> None:
    """输出目录能不能用。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的产物。
        marker: 有这个文件的目录才是 dsx 的产物。

    Raises:
        DsxError: ``DSX-E401``，已存在而不许替换，或存在的不是 dsx 的产物（任何时候都不替换）；``DSX-E405`` 看不了。
    """
    restore_interrupted(out, marker)
    kind = path_kind(out, "DSX-E405")
    if kind == "missing":
        return
    if kind != "directory":
        raise DsxError("DSX-E401", f"{out} 已存在，不是目录，不会替换它", "换一个输出位置")
    with disk_errors(out):
        if not any(out.iterdir()):
            return
    if path_kind(out / marker, "DSX-E405") != "file":
        what = f"{out} 已存在，里面没有 {marker}，不是 dsx 的产物，不会替换它"
        raise DsxError("DSX-E401", what, "换一个输出位置，或把它移开")
    if not overwrite:
        raise DsxError("DSX-E401", f"{out} 已存在", "换一个输出位置，或加 --overwrite 替换它")


def restore_interrupted(out: Path, marker: str = "manifest.json") -> None:
    """上一次恰在换上新内容的当口被杀，``out`` 不在了而旧的还在：放回原处。

    Args:
        out: 最终目录。
        marker: 见 :func:`check_output`。
    """
    out = out.absolute()
    with disk_errors(out):
        for old in () if os.path.exists(out) else _stale(out):  # 看不了的当作不在，由随后打开它的报
            if old.name.endswith(_RETIRED) and (old / marker).is_file():
                old.rename(out)
                return


@contextlib.contextmanager
def atomic_directory(out: Path, overwrite: bool, marker: str = "manifest.json") -> Iterator[Path]:
    """在旁边的临时目录里写，全部完成后改名。

    中途出错（含 Ctrl-C）则删除临时目录；进程被 SIGKILL 时残留的临时目录由下一次导出清掉，其中写了一半的权重连同日志移进新的临时
    目录，能不能接着写由写权重的人核对。任何时候 ``out`` 要么不存在、要么是原来的、要么是完整的新内容。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的产物。
        marker: 见 :func:`check_output`。

    Yields:
        临时目录。

    Raises:
        DsxError: ``DSX-E401`` 目标已存在；``DSX-E405`` 目标不可写。
    """
    out = output_path(out).absolute()
    check_output(out, overwrite, marker)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        leftovers = _stale(out)
        temporary = out.parent / f"{_prefix(out)}{os.getpid()}"
        if temporary in leftovers:  # 被杀的进程碰巧与这一个同号，容器里很常见
            moved = temporary.with_name(f"{temporary.name}.stale")
            shutil.rmtree(moved, ignore_errors=True)
            temporary.rename(moved)
            leftovers = _stale(out)
        temporary.mkdir()
        for stale in leftovers:
            if _is_half_written(stale) and not _is_half_written(temporary):
                for name in (WEIGHTS_FOLDER, JOURNAL_FILE):
                    (stale / name).rename(temporary / name)
            shutil.rmtree(stale, ignore_errors=True)
    try:
        yield temporary
        with disk_errors(out):
            (temporary / JOURNAL_FILE).unlink(missing_ok=True)
            if out.exists():
                retired = temporary.with_name(f"{temporary.name}{_RETIRED}")
                out.rename(retired)
                temporary.rename(out)
                shutil.rmtree(retired)
            else:
                temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, data: dict[str, Any]) -> None:
    """写成缩进的 UTF-8 JSON。"""
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_report(path: Path, data: dict[str, Any]) -> None:
    """写进 bundle 的 ``reports/``。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，bundle 写不了。
    """
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_json(path, data)


def hash_files(directory: Path, skipped: Collection[str], progress: Progress) -> dict[str, FileEntry]:
    """除 ``skipped`` 之外每个文件的大小与 sha256：打包的权重边写边算过了，检查点的硬链接由指纹核对。"""
    left_out = {directory / name for name in (*skipped, JOURNAL_FILE)}
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path not in left_out)
    progress.start("计算 sha256", sum(path.stat().st_size for path in paths), "bytes")
    files = {}
    for path in paths:
        name = path.relative_to(directory).as_posix()
        files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
        progress.advance(files[name].bytes, name)
    return files


def sha256_file(path: Path) -> str:
    """文件内容的 sha256（十六进制）。"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prefix(out: Path) -> str:
    """``out`` 的临时目录叫什么，后面接进程号。"""
    return f".{out.name}.tmp-"


def _is_half_written(temporary: Path) -> bool:
    """里面有写了一半、能接着写的权重。"""
    return (temporary / JOURNAL_FILE).is_file() and (temporary / WEIGHTS_FOLDER).is_dir()


def _stale(out: Path) -> list[Path]:
    """``out`` 的、进程已经不在的临时目录；在建立自己的之前调用，所以与自己同号的也是别人留下的。"""
    prefix = _prefix(out)
    return [
        path
        for path in sorted(out.parent.glob(f"{glob.escape(prefix)}*"))
        if not _alive(path.name.removeprefix(prefix))
    ]


def _alive(pid: str) -> bool:
    pid = pid.partition(".")[0]
    if not pid.isdigit():
        return True
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
