"""磁盘：原子地产生一个目录，被杀之后能接着写，写满时给出明确的错误。"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from deepseek_export.bundle.lock import locked
from deepseek_export.bundle.manifest import FileEntry
from deepseek_export.bundle.swap import swap
from deepseek_export.errors import DsxError, UnwrittenReport
from deepseek_export.machine import cores
from deepseek_export.paths import path_kind
from deepseek_export.plan.written import HEADROOM
from deepseek_export.progress import Progress
from deepseek_export.units import size

_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

#: 临时目录里写了一半的权重，以及记着写到哪里的日志；有日志的才会被下一次导出接着写。
WEIGHTS_FOLDER, JOURNAL_FILE = "weights", ".resume.json"

#: 换上新内容时，旧的先改成这个名字。
_RETIRED = ".old"

#: 至多几个文件同时算哈希：再多磁盘也跟不上。
_HASHERS = 8
#: 一次读多少字节（留在二级缓存里）；读够多少字节报一次进度。
_BLOCK, _REPORTED = 1 << 20, 16 << 20

_thread = threading.local()


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
        what = f"{where}：{error.strerror or error}"  # numpy、shutil 抛的有的没有错误号
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
        DsxError: ``DSX-E404`` / ``DSX-E405``，要复制而空间不够、写不了；``shutil.copytree`` 里也原样抛出来。
    """
    try:
        os.link(source, target)
    except OSError:
        check_free_space(Path(target).parent, Path(source).stat().st_size)
        with disk_errors(Path(target)):
            shutil.copyfile(source, target)


def check_output(out: Path, overwrite: bool, marker: str = "manifest.json") -> None:
    """输出目录能不能用。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的产物。
        marker: 有这个文件的目录才是 dsx 的产物。

    Raises:
        DsxError: ``DSX-E401``，已存在而不许替换，或存在的不是 dsx 的产物（任何时候都不替换），或是符号链接；``DSX-E405`` 看不了。
    """
    kind = path_kind(out, "DSX-E405")
    if out.is_symlink():
        what = f"{out} 是符号链接，指向 {os.readlink(out)}；dsx 不替换链接，也不替换它指向的"
        raise DsxError("DSX-E401", what, "直接给它指向的目录；或移开这个链接，或换一个输出位置")
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


@contextlib.contextmanager
def output_lock(out: Path | str, marker: str = "manifest.json") -> Iterator[Path]:
    """占住输出位置直到退出，见 :mod:`~deepseek_export.bundle.lock`；同一个线程可以再占一次。

    占住之后它的临时目录都是死了的进程留下的。上一次恰在换上新内容的当口被杀，``out`` 不在了而旧的还在，这时放回原处。

    Args:
        out: 最终目录。
        marker: 见 :func:`check_output`。

    Yields:
        最终目录的绝对路径。

    Raises:
        DsxError: ``DSX-E411`` 别人正在写；``DSX-E405`` 不可写，或文件系统没有锁。
    """
    out = output_path(out).absolute()
    path_kind(out, "DSX-E405")
    if out in (held := _held()):
        yield out
        return
    with contextlib.ExitStack() as stack:
        with disk_errors(out):
            stack.enter_context(locked(out))
            for old in () if os.path.lexists(out) else _stale(out):
                if old.name.endswith(_RETIRED) and (old / marker).is_file():
                    old.rename(out)
                    break
        held.add(out)
        stack.callback(held.discard, out)
        yield out


def being_replaced(out: Path) -> bool:
    """``out`` 不在，是因为换上新内容要改两次名、正在中间（或恰在那时被杀）；不能原子地交换的文件系统才有这回事。"""
    return any(old.name.endswith(_RETIRED) for old in _stale(out.absolute()))


@contextlib.contextmanager
def atomic_directory(out: Path, overwrite: bool, marker: str = "manifest.json") -> Iterator[Path]:
    """在旁边的临时目录里写，全部完成后换上去；期间占住 ``out``。

    中途出错（含 Ctrl-C）则删除临时目录；进程被 SIGKILL 时残留的临时目录由下一次导出清掉，其中写了一半的权重连同日志移进新的临时
    目录，能不能接着写由写权重的人核对。任何时候 ``out`` 要么不存在、要么是原来的、要么是完整的新内容；能不能替换，换上去之前再看一次。

    Args:
        out: 最终目录。
        overwrite: 允许替换已有的产物。
        marker: 见 :func:`check_output`。

    Yields:
        临时目录。

    Raises:
        DsxError: ``DSX-E401`` 目标已存在；``DSX-E405`` 目标不可写；``DSX-E411`` 别人正在写。
    """
    check_output(output_path(out), overwrite, marker)
    with output_lock(out, marker) as out:
        check_output(out, overwrite, marker)  # 占住之前，别人可能刚好写完
        with disk_errors(out):
            leftovers = _stale(out)
            temporary = out.with_name(f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}")
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
                check_output(out, overwrite, marker)
                _install(temporary, out, overwrite)
        finally:  # 成了，它是换下来的；没成，它是半成品
            shutil.rmtree(temporary, ignore_errors=True)


def _install(temporary: Path, out: Path, overwrite: bool) -> None:
    """换上去；换下来的在 ``temporary``，或已经删掉。不许替换的只改名：对空目录才改得成，由内核来保证。"""
    if overwrite and out.exists():
        retired = swap(temporary, out, temporary.with_name(f"{temporary.name}{_RETIRED}"))
        shutil.rmtree(retired, ignore_errors=True)  # 删不掉的由下一次清掉：新的已经在了
        return
    try:
        temporary.rename(out)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise DsxError("DSX-E401", f"{out} 在写的时候出现了", "换一个输出位置，或移开它") from error


def json_text(data: dict[str, Any]) -> str:
    """缩进的 JSON。"""
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def write_json(path: Path, data: dict[str, Any]) -> None:
    """写成缩进的 UTF-8 JSON。"""
    path.write_text(json_text(data), encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """整个换上 ``text``（UTF-8）；写不下就不留文件，上一次的也还在。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，写不了。
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(path):
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise


def write_report(path: Path, data: dict[str, Any]) -> None:
    """写进 bundle 的 ``reports/``；写不下就不留文件，上一次的也还在。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，bundle 写不了。
    """
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    replace_text(path, json_text(data))


@contextlib.contextmanager
def keeping(report: Any) -> Iterator[None]:
    """其中写不下的，抛带着 ``report`` 的 :class:`UnwrittenReport`。"""
    try:
        yield
    except DsxError as error:
        raise UnwrittenReport(error, report) from error


def hash_files(directory: Path, skipped: Collection[str], progress: Progress) -> dict[str, FileEntry]:
    """除 ``skipped`` 之外每个文件的大小与 sha256：打包的权重边写边算过了。"""
    left_out = {directory / name for name in (*skipped, JOURNAL_FILE)}
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path not in left_out)
    sums = sha256_files(paths, "计算 sha256", progress)
    return {
        path.relative_to(directory).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sums[path])
        for path in paths
    }


def sha256_files(paths: Sequence[Path], stage: str, progress: Progress) -> dict[Path, str]:
    """每个文件的 sha256；几个文件同时算（hashlib 算的时候不占解释器的锁）。

    Args:
        paths: 要读的文件。
        stage: 进度里怎么称呼。
        progress: 以字节计的进度；只在调用的线程里汇报。
    """
    progress.start(stage, sum(path.stat().st_size for path in paths), "bytes")
    read: SimpleQueue[tuple[int, str] | Future[str]] = SimpleQueue()
    stop = threading.Event()

    def digest(path: Path) -> str:
        return _sha256(path, lambda amount: read.put((amount, path.name)), stop)

    with ThreadPoolExecutor(min(cores(), _HASHERS)) as pool:
        try:
            running = {path: pool.submit(digest, path) for path in paths}
            for future in running.values():
                future.add_done_callback(read.put)
            left = len(running)
            while left:
                found = read.get()
                if isinstance(found, Future):
                    found.result()  # 出了错就停
                    left -= 1
                else:
                    progress.advance(*found)
        except BaseException:  # 出错、Ctrl-C：正在读的停下，没有开始的不再开始
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {path: future.result() for path, future in running.items()}


def _sha256(path: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    """逐块读，每 :data:`_REPORTED` 字节说一声；``stop`` 之后不再读，结果没有人要了。"""
    digest, block, unsaid = hashlib.sha256(), memoryview(bytearray(_BLOCK)), 0
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (count := file.readinto(block)):
            digest.update(block[:count])
            unsaid += count
            if unsaid >= _REPORTED:
                advance(unsaid)
                unsaid = 0
    advance(unsaid)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """文件内容的 sha256（十六进制）。"""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prefix(out: Path) -> str:
    """``out`` 的临时目录叫什么，后面接进程号与随机数。"""
    return f".{out.name}.tmp-"


def _is_half_written(temporary: Path) -> bool:
    """里面有写了一半、能接着写的权重。"""
    return (temporary / JOURNAL_FILE).is_file() and (temporary / WEIGHTS_FOLDER).is_dir()


def _stale(out: Path) -> list[Path]:
    """``out`` 的临时目录；占住了 ``out`` 而还没有建自己的时候，它们都是死了的进程留下的。"""
    return sorted(out.parent.glob(f"{glob.escape(_prefix(out))}*"))


def _held() -> set[Path]:
    """这个线程占住的输出位置。"""
    return _thread.__dict__.setdefault("held", set())
