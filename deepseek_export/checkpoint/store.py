"""safetensors 的只读视图：自己解析文件头并严格核对，权重按需映射，不拷贝、不碰 pickle。"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from deepseek_export.checkpoint.fields import parse_json, shown
from deepseek_export.checkpoint.fingerprint import FileFingerprint, Fingerprint, sample_sha256
from deepseek_export.dtypes import BY_SAFETENSORS
from deepseek_export.errors import DsxError
from deepseek_export.paths import MAX_LARGE_TEXT, open_regular, read_text

MAX_HEADER = 100 << 20
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
#: 叠放的专家的名字 → 每个专家依次是哪几个矩阵。
_STACKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
)
_MAX_STACKED = 2 * 4096  # 配置里专家数的上限，各两个矩阵；文件头声称更多的不展开
_PERMISSIONS = "检查文件的权限与磁盘，确认读得了"
_REDOWNLOAD = "重新下载这个文件，并核对大小与 SHA-256"


@dataclass(frozen=True)
class TensorSpec:
    """一个张量在磁盘上的样子。

    Attributes:
        name: 检查点里的名字。
        dtype: safetensors 的标签，例如 ``"BF16"``。
        shape: 形状；标量是 ``()``。
        file: 所在文件。
        offset: 数据在文件里的绝对起点（字节）。
        nbytes: 数据长度（字节）。
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Shard:
    path: Path
    size: int
    header_sha256: str
    specs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class TensorStore:
    """一个检查点目录里的全部张量；只有 :meth:`read`、:meth:`read_rows` 与 :meth:`fingerprint` 才会碰数据。

    叠在一起存的专家看成逐个专家的张量，名字与逐个存的一样，见 :func:`_per_expert`。
    """

    directory: Path
    _shards: tuple[_Shard, ...]
    _specs: Mapping[str, TensorSpec]
    _maps: dict[Path, np.memmap] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> TensorStore:
        """读全部文件头并核对；有索引就以索引为准，否则读 ``model.safetensors``。

        Raises:
            DsxError: ``DSX-E101`` 没有 safetensors 权重，或读不了；``DSX-E110`` 文件头或长度不对、张量重复；
                ``DSX-E118`` 索引与分片不一致。
        """
        index = directory / INDEX_NAME
        # 在那里就读它：不是普通文件的由 read_text 拒绝，不当作没有。
        if os.path.lexists(index):
            weight_map = _read_index(index)
            names = sorted(set(weight_map.values()))
        elif _is_file(directory / SINGLE_NAME):
            weight_map, names = None, [SINGLE_NAME]
        else:
            pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
            found = f"，只有 {pickled[0].name} 这类 pickle 文件，dsx 不读 pickle" if pickled else ""
            raise DsxError(
                "DSX-E101",
                f"{directory} 里既没有 {SINGLE_NAME} 也没有 {INDEX_NAME}{found}",
                "换用 safetensors 格式的检查点，或先用 transformers 的 save_pretrained 转存",
            )
        for name in names:
            if not _is_file(directory / name):
                todo = "补齐分片，或重新下载整个检查点"
                raise DsxError("DSX-E118", f"{index} 提到的分片 {name} 不存在", todo)
        shards = tuple(_read_shard(directory / name) for name in names)
        specs: dict[str, TensorSpec] = {}
        for shard in shards:
            for name, spec in shard.specs.items():
                if name in specs:
                    what = f"张量 {name} 同时出现在 {specs[name].file.name} 和 {shard.path.name}"
                    raise DsxError("DSX-E110", what, "重新下载检查点，不要混放两个版本的分片")
                specs[name] = spec
        if weight_map is not None:
            _check_index(index, weight_map, specs)
        return cls(directory, shards, MappingProxyType(_per_expert(specs)))

    @classmethod
    def of(cls, directory: Path, names: Iterable[str]) -> TensorStore:
        """几个 safetensors 文件里的张量，名字原样；不是检查点。

        Raises:
            DsxError: ``DSX-E101`` / ``DSX-E110``，同 :meth:`open`。
        """
        shards = tuple(_read_shard(directory / name) for name in names)
        specs = {name: spec for shard in shards for name, spec in shard.specs.items()}
        return cls(directory, shards, MappingProxyType(specs))

    def joined(self, other: TensorStore) -> TensorStore:
        """连同另一处的张量；两边的名字不重复。"""
        specs = MappingProxyType({**self._specs, **other._specs})
        return TensorStore(self.directory, (*self._shards, *other._shards), specs)

    @property
    def names(self) -> tuple[str, ...]:
        """全部张量名，按字典序。"""
        return tuple(sorted(self._specs))

    @property
    def files(self) -> tuple[Path, ...]:
        """全部 safetensors 文件。"""
        return tuple(shard.path for shard in self._shards)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, name: str) -> TensorSpec:
        """张量的元数据；没有这个名字时抛 ``KeyError``（属于 dsx 的缺陷）。"""
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """取一个张量的只读视图，不拷贝。

        Returns:
            形状为 ``store[name].shape`` 的数组；BF16 与 FP8 用 ml_dtypes 的类型。

        Raises:
            DsxError: ``DSX-E110`` 打开之后文件又变短了。
        """
        spec = self._specs[name]
        dtype = BY_SAFETENSORS[spec.dtype].numpy
        if spec.nbytes == 0:
            empty: np.ndarray = np.empty(spec.shape, dtype)
            empty.setflags(write=False)
            return empty
        if spec.file not in self._maps:
            self._maps[spec.file] = np.memmap(spec.file, dtype=np.uint8, mode="r")
        raw = self._maps[spec.file][spec.offset : spec.offset + spec.nbytes].view(np.ndarray)
        if raw.size != spec.nbytes:
            raise DsxError("DSX-E110", f"{spec.file} 在读取 {name} 时变短了", "不要在导出期间改动检查点")
        return raw.view(dtype).reshape(spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """把第 0 维的 ``[start, stop)`` 读进新的内存。

        映射过的页会一直算作常驻内存；逐块处理比内存大的张量时用这个，用完即还。

        Args:
            name: 张量名，至少一维。
            start, stop: 行的范围，不越界。

        Raises:
            DsxError: ``DSX-E110`` 打开之后文件又变短了；``DSX-E101`` 读不了。
        """
        spec = self._specs[name]
        row = spec.nbytes // max(spec.shape[0], 1)
        raw = np.empty((stop - start) * row, np.uint8)
        try:
            with spec.file.open("rb", buffering=0) as stream:
                stream.seek(spec.offset + start * row)
                filled = 0
                while filled < raw.size and (got := stream.readinto(raw[filled:].data)):
                    filled += got
        except OSError as error:
            raise _unreadable(spec.file, f"读 {name} 时：{error.strerror}") from error
        if filled != raw.size:
            raise DsxError("DSX-E110", f"{spec.file} 在读取 {name} 时变短了", "不要在导出期间改动检查点")
        return raw.view(BY_SAFETENSORS[spec.dtype].numpy).reshape(stop - start, *spec.shape[1:])

    def fingerprint(self) -> Fingerprint:
        """检查点的身份，见 :mod:`~deepseek_export.checkpoint.fingerprint`。

        Raises:
            DsxError: ``DSX-E101`` 打开之后读不了。
        """
        return Fingerprint(files=tuple(_fingerprint(shard) for shard in self._shards))


def _fingerprint(shard: _Shard) -> FileFingerprint:
    try:
        samples = sample_sha256(shard.path, sorted((s.offset, s.nbytes) for s in shard.specs.values()))
    except OSError as error:
        raise _unreadable(shard.path, f"读不了：{error.strerror}") from error
    return FileFingerprint(
        name=shard.path.name,
        size=shard.size,
        header_sha256=shard.header_sha256,
        samples_sha256=samples,
    )


def _is_file(path: Path) -> bool:
    """普通文件（或指向它的符号链接）吗；名字长到文件系统不认也算不是，没有权限看的留给打开时报。"""
    try:
        return path.is_file()
    except PermissionError:
        return True
    except OSError:
        return False


def _read_index(index: Path) -> dict[str, str]:
    """读索引的 ``weight_map``；分片名必须是同目录下的普通文件名。"""
    todo = "重新下载索引文件"
    try:
        data = parse_json(read_text(index, MAX_LARGE_TEXT))
    except OSError as error:
        raise _unreadable(index, f"打不开：{error.strerror}") from error
    except ValueError as error:
        raise DsxError("DSX-E118", f"{index} 读不了：{error}", todo) from error
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DsxError("DSX-E118", f"{index} 里没有 weight_map", todo)
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0:")
        if not plain:
            what = f"{index} 把 {shown(name)} 指到 {shown(file)}，分片必须是同目录下的 .safetensors 文件"
            raise DsxError("DSX-E118", what, todo)
    return weight_map


def _check_index(index: Path, weight_map: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
    """索引与各分片的文件头必须逐个名字对得上。"""
    for name in sorted(weight_map.keys() | specs.keys()):
        claimed = weight_map.get(name)
        actual = specs[name].file.name if name in specs else None
        if claimed != actual:
            what = f"张量 {name}：索引说在 {claimed or '（没有）'}，实际在 {actual or '（没有）'}"
            raise DsxError("DSX-E118", f"{index} 与分片不一致。{what}", "重新下载索引和分片，保证同一版本")


def _per_expert(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """叠放的专家拆成逐个的：``experts.gate_up_proj`` [E, 2I, D]（gate 在前）、``experts.down_proj`` [E, D, I]。

    每个专家的每个矩阵在文件里本来就是连续的一段，所以只换名字、形状与起点。transformers 在内存里就这样叠放，A.X-K1 也照这样发布。
    形状拆不开的原样留着，由 :class:`~deepseek_export.checkpoint.checkpoint.Checkpoint` 当作多出来的张量拒绝。
    """
    split: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        head, _, kind = name.rpartition(".mlp.experts.")
        parts = _STACKED.get(kind, ()) if head and len(spec.shape) == 3 else ()
        count = spec.shape[0] * len(parts) if parts else 0
        if not 0 < count <= _MAX_STACKED or spec.shape[1] % len(parts) or spec.nbytes % count:
            split[name] = spec
            continue
        size, rows, columns = spec.nbytes // count, spec.shape[1], spec.shape[2]
        for index in range(count):
            expert, part = divmod(index, len(parts))
            alone = f"{head}.mlp.experts.{expert}.{parts[part]}.weight"
            if alone in specs:
                raise _broken(spec.file, f"专家既叠放成 {name}，又另有 {alone}")
            shape = (rows // len(parts), columns)
            split[alone] = TensorSpec(alone, spec.dtype, shape, spec.file, spec.offset + index * size, size)
    return split


def _read_shard(path: Path) -> _Shard:
    """读一个文件的头部；数据区必须被各张量首尾相接、恰好铺满。"""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _broken(path, f"只有 {size} 字节，太短，连文件头的长度都放不下")
            (length,) = struct.unpack("<Q", prefix)
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _broken(path, f"文件头长度是 {length}，文件共 {size} 字节")
            header = stream.read(length)
    except OSError as error:
        raise _unreadable(path, f"打不开：{error.strerror}") from error
    try:
        # 先按 UTF-8 解码：交给 json 的字节会被它猜成 UTF-16、UTF-32，而 safetensors 不认。
        entries = parse_json(header.decode("utf-8"))
    except ValueError as error:
        raise _broken(path, f"文件头不是 UTF-8 的 JSON：{error}") from error
    if len(header) != length or not isinstance(entries, dict):
        raise _broken(path, "文件头不是 JSON 对象")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ 应是字符串到字符串的对象")
    for text in (*entries, *metadata, *metadata.values()):
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise _broken(path, f"文件头里的 {text!r} 不是合法的 Unicode")
    specs = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for spec in sorted(specs.values(), key=lambda s: (s.offset, s.nbytes)):
        if spec.offset != end:
            raise _broken(path, f"张量 {spec.name} 从第 {spec.offset} 字节开始，应从第 {end} 字节开始")
        end += spec.nbytes
    if end != size:
        raise _broken(path, f"文件头描述了 {end} 字节，文件实际有 {size} 字节")
    return _Shard(path, size, hashlib.sha256(prefix + header).hexdigest(), MappingProxyType(specs))


def _parse_entry(path: Path, name: str, entry: Any, base: int) -> TensorSpec:
    """核对文件头里的一个张量；``base`` 是数据区的起点。"""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"张量 {name} 的描述不完整或有多余字段")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise _broken(path, f"张量 {name} 的 dtype 是 {shown(dtype)}，不是 dsx 认识的 safetensors 类型")
    if not _is_sizes(shape) or len(shape) > 32 or math.prod(dim or 1 for dim in shape) > 1 << 60:
        raise _broken(path, f"张量 {name} 的形状是 {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _broken(path, f"张量 {name} 的 data_offsets 是 {shown(offsets)}")
    nbytes, needed = offsets[1] - offsets[0], BY_SAFETENSORS[dtype].nbytes(math.prod(shape))
    if nbytes != needed:
        raise _broken(path, f"张量 {name} 占 {nbytes} 字节，按 {dtype} {shape} 应为 {needed} 字节")
    return TensorSpec(name, dtype, tuple(shape), path, base + offsets[0], nbytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _broken(path: Path, what: str) -> DsxError:
    return DsxError("DSX-E110", f"{path}：{what}", _REDOWNLOAD)


def _unreadable(path: Path, what: str) -> DsxError:
    """操作系统不给读：文件未必坏了，不叫人重新下载。"""
    return DsxError("DSX-E101", f"{path}：{what}", _PERMISSIONS)
