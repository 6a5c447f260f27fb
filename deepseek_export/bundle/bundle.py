"""读取一个导出好的 bundle。

读的同时别人可以 ``--overwrite`` 它。一个目录里的文件总是一起换的，所以只要读完之后 ``manifest.json`` 还是打开时的那一个，中间读到的
就全是它的；不是的由 :func:`read_bundle` 从头再读。
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from deepseek_export.bundle.compared import Compared, read_compared, write_compared
from deepseek_export.bundle.disk import being_replaced, sha256_file, sha256_files
from deepseek_export.bundle.manifest import SCHEMA_VERSION, Manifest
from deepseek_export.checkpoint import load_model_config
from deepseek_export.errors import DsxError, first_invalid
from deepseek_export.paths import MAX_LARGE_TEXT, check_readable, open_regular, path_kind, read_open
from deepseek_export.progress import Progress

_T = TypeVar("_T")

#: 读的时候接连被换掉这么多次就不再试；每次之间歇一会儿（秒）。
_ATTEMPTS, _PAUSE = 5, 0.1


class BundleReplaced(DsxError):
    """读到一半，bundle 被换成了另一次导出的（``DSX-E412``）；从头再读就好。"""


class _Identity(NamedTuple):
    """一个文件是不是同一个：inode 会被后来的文件重新用到，ctime 谁也改不回去。"""

    device: int
    inode: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_ctime_ns)


@dataclass(frozen=True)
class Bundle:
    """一个 bundle 目录及其 manifest。

    Attributes:
        path: 目录。
        manifest: 打开时的 manifest。
        opened: 打开时 manifest.json 的身份；自己拼起来的没有，:meth:`steady` 不核对它。
    """

    path: Path
    manifest: Manifest
    opened: _Identity | None = None

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """打开，核对文件是否齐全、大小是否相符，并算权重之外每个文件的哈希；权重的见 :meth:`check_weights`。

        Raises:
            DsxError: ``DSX-E402`` 不是 bundle、看不了或缺文件；``DSX-E403`` manifest 读不了、版本不认识或内容不成立；
                ``DSX-E406`` 文件的大小或哈希不符；``DSX-E412`` 正好被换掉，见 :func:`read_bundle`。
        """
        path = Path(path)
        try:
            bundle = cls(path, *_read_manifest(path))
        except DsxError as error:
            if error.code == "DSX-E402" and being_replaced(path):
                raise _replaced(path) from error
            raise
        with bundle.steady():
            _check_files(path, bundle.manifest)
            _check_model(path, bundle.manifest)
        return bundle

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """期间 bundle 没有被换掉：换掉了，读到的就可能一半旧一半新，不能用；期间出的错也由此而来。

        Raises:
            DsxError: ``DSX-E412``。
        """
        try:
            yield
        except Exception as error:
            if not self._in_place():
                raise _replaced(self.path) from error
            raise
        self.check_in_place()

    def check_in_place(self) -> None:
        """还是打开时的那一个；读了很久、要下结论或写进它里面的，最后看一次。

        Raises:
            DsxError: ``DSX-E412``。
        """
        if not self._in_place():
            raise _replaced(self.path)

    def _in_place(self) -> bool:
        if self.opened is None:
            return True
        try:
            return _Identity.of((self.path / "manifest.json").stat()) == self.opened
        except OSError:
            return False

    @property
    def model_path(self) -> Path:
        """主模型的 ONNX 文件。"""
        return self.path / self.manifest.main.file

    def check_weights(self, progress: Progress) -> None:
        """读一遍全部权重，核对每个文件的 sha256；其中取自下载记录的，记下核对过了。

        Raises:
            DsxError: ``DSX-E412`` 正好被换掉；``DSX-E406`` 打包的权重被改过；``DSX-E408`` 按引用的检查点被改过；``DSX-E413`` 按引用而导出时没有算整个的哈希。
        """
        recorded, names = self.manifest.files, self.manifest.weights.files
        if unknown := [name for name in names if name not in recorded]:
            raise DsxError(
                "DSX-E413",
                f"{self.path} 按引用导出时没有算 {unknown[0]} 的 sha256（--no-hash-weights，或旧版 dsx 导出），证明不了它没有变",
                "不带 --no-hash-weights 重新导出；或加 --no-verify-weights，只抽查每个张量的几处",
            )
        self._compare(names, progress)

    def confirm_weights(self, verify: bool | None, progress: Progress) -> None:
        """加载之前：sha256 取自下载记录、还从来没有读过的权重文件，读一遍来核对；核对过的记下来，下次不读。

        Args:
            verify: ``True`` 全部都读，同 :meth:`check_weights`；``None`` 只读从来没有核对过的；``False`` 一个也不读。
            progress: 进度。

        Raises:
            DsxError: 同 :meth:`check_weights`。
        """
        if verify:
            self.check_weights(progress)
        elif verify is None and (published := self.manifest.published):
            done = read_compared(self.path)
            with self.steady():
                unread = [name for name in published if done.get(name) != self._now(name)]
            if unread:
                self._compare(unread, progress)

    def _now(self, name: str) -> Compared:
        """权重文件现在的样子，假定内容与 manifest 相符。"""
        return Compared.of(self.manifest.files[name].sha256, (self.path / name).stat())

    def _compare(self, names: Sequence[str], progress: Progress) -> None:
        """读这几个权重文件来核对；取自下载记录的记下核对过了，记不下来就说一声。"""
        paths = {name: self.path / name for name in names}
        with self.steady():
            before = {name: self._now(name) for name in self.manifest.published if name in paths}
            sums = sha256_files(list(paths.values()), "核对权重的 sha256", progress)
            for name, path in paths.items():
                entry = self.manifest.files[name]
                if sums[path] == entry.sha256:
                    continue
                if entry.sha256_from == "hub":
                    raise _not_published(path)
                if self.manifest.weights.mode == "reference":
                    raise checkpoint_changed(path, "内容")
                raise _altered(path, "的 sha256 与 manifest 不符")
        if before:
            try:
                write_compared(self.path, read_compared(self.path) | before)
            except DsxError as error:
                progress.note(f"权重核对过了，却记不下来（{error.what}）：下次加载还要再读一遍")


def read_bundle(path: Path | str, read: Callable[[Bundle], _T]) -> _T:
    """打开 bundle 并读它：``read`` 读到的全是同一次导出的，哪怕别人正在替换它；读到一半被换掉的从头再来。

    Args:
        path: bundle 目录。
        read: 读这个 bundle；会不止一次地被调用。

    Returns:
        ``read`` 的结果；之后不再靠路径打开 bundle 里的文件，才与以后的替换无关。

    Raises:
        DsxError: ``DSX-E412`` 接连被换掉；其余见 :meth:`Bundle.open` 与 ``read``。
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            bundle = Bundle.open(path)
            with bundle.steady():
                return read(bundle)
        except BundleReplaced:
            if not left:
                raise
        time.sleep(_PAUSE)
    raise AssertionError


def checkpoint_changed(path: Path, what: str) -> DsxError:
    """按引用的 bundle 里，检查点的一个文件变了。"""
    return DsxError(
        "DSX-E408",
        f"{path} 的{what}与导出时不同",
        "检查点被改过：从原来的检查点重新导出；想不受检查点影响，用 --weights packed 或 dsx pack",
    )


def _not_published(path: Path) -> DsxError:
    """内容与下载记录里的 sha256 不同；导出时没有读过，不知道是那之前还是之后变的。"""
    return DsxError(
        "DSX-E408",
        f"{path} 的内容与下载时的 sha256 不同",
        "文件坏了或改过：重新下载再导出；是有意改的，把检查点拷到别处（不带下载记录）再导出",
    )


def _replaced(path: Path) -> BundleReplaced:
    return BundleReplaced("DSX-E412", f"{path} 在读的时候被换成了另一次导出的", "等那次导出写完，再来一次")


def _altered(file: Path, how: str) -> DsxError:
    return DsxError("DSX-E406", f"{file} {how}", "文件被截断或改过：重新拷贝或重新导出")


def _read_manifest(path: Path) -> tuple[Manifest, _Identity]:
    """manifest 与它所在的文件的身份，取自同一个打开的文件。"""
    if (kind := path_kind(path, "DSX-E402")) != "directory":
        what = f"{path} 不存在" if kind == "missing" else f"{path} 不是目录"
        raise DsxError("DSX-E402", what, "确认路径；bundle 是 dsx export 产生的目录")
    file = path / "manifest.json"
    if path_kind(file, "DSX-E402") != "file":
        if path_kind(path / "stages.json", "DSX-E402") == "file":
            raise DsxError(
                "DSX-E748",
                f"{path} 是一套 stage，这里要的是一个 bundle",
                "用切开之前的 bundle；一套 stage 可以 generate、chat、serve、batch、bench、verify、build、pack、inspect",
            )
        raise DsxError("DSX-E402", f"{path} 里没有 manifest.json", "确认路径；bundle 由 dsx export 产生")
    try:
        with open_regular(file) as stream:
            identity = _Identity.of(os.fstat(stream.fileno()))
            data = json.loads(read_open(stream, MAX_LARGE_TEXT).decode("utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise DsxError(
                "DSX-E403",
                f"{file} 的 schema_version = {version!r}，这一版 dsx 只认 {SCHEMA_VERSION}",
                "用当前的 dsx 重新导出",
            )
        return Manifest.model_validate(data), identity
    except ValidationError as error:
        raise DsxError("DSX-E403", f"{file}：{first_invalid(error)}", "重新导出") from error
    except OSError as error:
        raise DsxError("DSX-E403", f"打不开 {file}：{error.strerror}", "检查权限") from error
    except (ValueError, RecursionError) as error:
        raise DsxError("DSX-E403", f"{file} 不是合法的 JSON：{error}", "重新拷贝或重新导出") from error


def _check_files(path: Path, manifest: Manifest) -> None:
    """文件齐全、大小相符、权重之外的哈希相符；按引用的权重由打开检查点的来核对，它说得出哪里不对。"""
    weights = {*manifest.weights.files}
    for name in (*manifest.weights.files, *manifest.files):
        if path_kind(path / name, "DSX-E402") != "file":
            raise DsxError("DSX-E402", f"{path} 缺少 {name}", "重新导出，或把整个目录一起拷贝")
        check_readable(path / name, "DSX-E402", "检查权限")
    for name, entry in manifest.files.items():
        file = path / name
        if name in weights and manifest.weights.mode == "reference":
            continue
        if (found := file.stat().st_size) != entry.bytes:
            raise _altered(file, f"有 {found} 字节，manifest 记的是 {entry.bytes}")
        if name not in weights and sha256_file(file) != entry.sha256:
            raise _altered(file, "的 sha256 与 manifest 不符")


def _check_model(path: Path, manifest: Manifest) -> None:
    """manifest 里的模型就是旁边 config.json 的那一个：取值成不成立，由读检查点的那一套来查。"""
    config = path / "config.json"
    try:
        model = load_model_config(config)
    except DsxError as error:
        raise DsxError("DSX-E403", f"核对模型的配置时：{error.what}", "重新拷贝或重新导出") from error
    for field in fields(model):
        written, found = getattr(manifest.model, field.name), getattr(model, field.name)
        if written != found:
            what = (
                f"{path / 'manifest.json'}：model.{field.name} 是 {written!r}，{config.name} 里却是 {found!r}"
            )
            raise DsxError("DSX-E403", what, "重新拷贝或重新导出")
