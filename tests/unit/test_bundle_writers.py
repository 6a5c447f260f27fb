"""同一个输出位置上的几个写者：锁、换上去的那一刻、别人的文件、符号链接。"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import atomic_directory, disk_errors, link_or_copy, output_lock, sha256_files
from deepseek_export.bundle.foreign import check_replaceable, foreign_files
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress, Unit

pytestmark = pytest.mark.unit


def refused(code: str, call: Callable[[], object]) -> DsxError:
    with pytest.raises(DsxError) as error:
        call()
    assert error.value.code == code, error.value
    return error.value


def write(out: Path, text: str, overwrite: bool = False) -> None:
    """一个最小的产物：manifest.json 与另一个文件里是同样的话。"""
    with atomic_directory(out, overwrite) as directory:
        for name in ("manifest.json", "other"):
            (directory / name).write_text(text)


def content(out: Path) -> set[str]:
    return {(out / name).read_text() for name in ("manifest.json", "other")}


@pytest.fixture(params=["exchange", "two renames"])
def renames(request, monkeypatch) -> str:
    """内核能原子地交换，与不能（旧内核、别的系统）。"""
    if request.param == "two renames":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    return request.param


def test_overwrite_swaps_whole_directories(tmp_path: Path, renames: str):
    out = tmp_path / "out"
    write(out, "old")
    write(out, "new", overwrite=True)
    assert content(out) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_exchange_falls_back(tmp_path: Path, monkeypatch, code: int):
    def renameat2(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=renameat2))
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == {"new"}


def test_failing_second_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch):
    """两次改名之间出错（例如 Ctrl-C）：旧的放回去，不留临时目录。"""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    out, rename = tmp_path / "out", Path.rename
    write(out, "old")

    def interrupted(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(out, "new", overwrite=True)
    assert content(out) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reader_between_two_renames_is_told_to_come_back(tmp_path: Path):
    """不能原子交换的文件系统上，OUT 有一瞬间不在：那不是“不存在”。"""
    refused("DSX-E402", lambda: Bundle.open(tmp_path / "out"))
    (tmp_path / ".out.tmp-1-abc.old").mkdir()
    refused("DSX-E412", lambda: Bundle.open(tmp_path / "out"))


def test_what_appeared_in_the_meantime_is_not_replaced(tmp_path: Path):
    """开工时没有、换上去的时候有了：不许替换就不替换，与开工时一样；许的照常。"""
    out = tmp_path / "out"

    def race(overwrite: bool):
        with atomic_directory(out, overwrite) as directory:
            (directory / "manifest.json").write_text("late")
            out.mkdir(exist_ok=True)
            (out / "manifest.json").write_text("early")

    assert "--overwrite" in refused("DSX-E401", lambda: race(False)).todo
    assert (out / "manifest.json").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    race(True)
    assert (out / "manifest.json").read_text() == "late"


def test_what_appeared_and_is_not_ours_is_never_replaced(tmp_path: Path):
    out = tmp_path / "out"

    def race():
        with atomic_directory(out, True) as directory:
            (directory / "manifest.json").write_text("late")
            out.mkdir()
            (out / "mine").touch()

    refused("DSX-E401", race)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_threads_of_one_process_do_not_share_an_output(tmp_path: Path):
    """同一个进程的另一个线程也立即被拒绝，信息里写着进程号；同一个线程可以再占一次。"""
    out, seen = tmp_path / "out", []

    def second():
        seen.append(refused("DSX-E411", lambda: write(out, "second")))

    with output_lock(out):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        write(out, "first")
    assert f"进程 {os.getpid()} " in seen[0].what
    assert content(out) == {"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_dies_with_its_process(tmp_path: Path):
    """别的进程占着就拒绝，写明是哪个；它被 SIGKILL 之后锁文件还在，却不再拦人，用完删掉。"""
    out = tmp_path / "out"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with output_lock(out):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    assert f"进程 {child} " in refused("DSX-E411", lambda: write(out, "ours")).what
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".out.lock").exists()
    write(out, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_file_deleted_while_we_waited_is_taken_again(tmp_path: Path, monkeypatch):
    """锁上的是前一个人刚删掉的文件：不算占住，重来。"""
    lock, flock, calls = tmp_path / ".out.lock", fcntl.flock, []

    def slow(file: int, operation: int) -> None:
        flock(file, operation)
        calls.append(file)
        if len(calls) == 1:
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", slow)
    with output_lock(tmp_path / "out"):
        assert lock.exists()
    assert len(calls) == 2


def test_no_folders_are_left_behind_by_a_lock(tmp_path: Path):
    """上级目录是为锁建的：什么也没写成就删掉。"""
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a/b/out", False):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a/b/out", "new")
    assert content(tmp_path / "a/b/out") == {"new"}


def test_a_folder_whose_copy_does_not_fit_is_a_full_disk(tmp_path: Path, monkeypatch):
    """硬链接不了、复制到一半磁盘满了：copytree 把错误攒成一串，说的仍是磁盘满了。"""

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/model.plan").touch()
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfile", full)

    def copy() -> None:
        with disk_errors(tmp_path):
            shutil.copytree(tmp_path / "engines", tmp_path / "again", copy_function=link_or_copy)

    assert "model.plan" in refused("DSX-E404", copy).what


def test_an_error_without_a_number_still_says_what(tmp_path: Path):
    """numpy 写不下时抛的 OSError 没有错误号：原话照印，不印 None。"""

    def write_short() -> None:
        with disk_errors(tmp_path):
            raise OSError("8 requested and 4 written")

    assert "8 requested and 4 written" in refused("DSX-E405", write_short).what


def test_a_lock_that_cannot_be_signed_is_not_left_behind(tmp_path: Path, monkeypatch):
    """磁盘满得连谁占着也写不下：锁文件与为它建的上级目录都不留下。"""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    refused("DSX-E404", lambda: write(tmp_path / "a/b/out", "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch, code: int):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "没有文件锁" in refused("DSX-E405", lambda: write(tmp_path / "out", "new")).what


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["bundle", "empty", "nothing"])
def test_symbolic_link_is_refused_before_any_work(tmp_path: Path, target: str, overwrite: bool):
    """EXPORT-13：OUT 是符号链接，指向什么都拒绝；链接与它指向的都没有动。"""
    write(tmp_path / "bundle", "old")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    out.symlink_to(target)
    entered = []

    def enter():
        with atomic_directory(out, overwrite):
            entered.append(True)

    assert target in refused("DSX-E401", enter).what
    assert not entered
    assert out.is_symlink()
    assert content(tmp_path / "bundle") == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "empty", "out"}


def test_foreign_files_of_a_broken_manifest(tmp_path: Path):
    """manifest 读不懂就不知道哪些是 dsx 写的：除了它自己都算别人的；不是 bundle 的目录由别的检查来管。"""
    assert foreign_files(tmp_path / "none") == []
    out = tmp_path / "out"
    (out / "engines/rtx-sm89").mkdir(parents=True)
    for name in ("manifest.json", "model.onnx", "engines/rtx-sm89/model.plan"):
        (out / name).write_text("{")
    assert foreign_files(out) == ["model.onnx"]
    assert "model.onnx" in refused("DSX-E401", lambda: check_replaceable(out, True)).what


class TestHashing:
    """``sha256_files``：几个文件同时算。"""

    SIZES = (0, 1, (40 << 20) + 7, 3 << 20)

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / str(index) for index in range(len(self.SIZES))]
        for path, size in zip(paths, self.SIZES, strict=True):
            path.write_bytes(os.urandom(size))
        return paths

    def test_sums_and_progress_in_bytes(self, files: list[Path]):
        """值与 hashlib 的相同；进度一共正好那么多字节，大文件中途就有，都在调用的线程里。"""
        amounts: dict[str, list[int]] = {path.name: [] for path in files}
        totals, threads = [], set()

        class Recording(Progress):
            def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
                totals.append((total, unit))

            def advance(self, amount: int = 1, detail: str = "") -> None:
                amounts[detail].append(amount)
                threads.add(threading.current_thread())

        sums = sha256_files(files, "算", Recording())
        assert sums == {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert totals == [(sum(self.SIZES), "bytes")]
        assert [sum(amounts[path.name]) for path in files] == list(self.SIZES)
        assert len(amounts["2"]) > 1
        assert threads == {threading.current_thread()}

    def test_an_interrupt_stops_what_is_being_read(self, files: list[Path]):
        """Ctrl-C 之后正在读的停下，原样抛出。"""

        class Interrupted(Progress):
            def advance(self, amount: int = 1, detail: str = "") -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sha256_files(files, "算", Interrupted())
        assert not [one for one in threading.enumerate() if one.name.startswith("ThreadPoolExecutor")]

    def test_a_file_that_cannot_be_read(self, tmp_path: Path, files: list[Path]):
        """读不了的原样抛出，不等别的读完才说。"""
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            sha256_files([*files, tmp_path / "folder"], "算", Progress())
