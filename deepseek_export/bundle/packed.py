"""自包含的权重文件：一个标准的 safetensors，ONNX 的 external data 直接指进它的偏移。

逐块写出，内存与模型大小无关；边写边算 sha256。每写完一段就落盘并记一笔日志，进程被杀之后下一次从那里接着写，结果逐字节相同。
文件用 safetensors 库也能打开，便于核对。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deepseek_export.bundle.disk import JOURNAL_FILE, WEIGHTS_FOLDER, disk_errors
from deepseek_export.bundle.graph import Slot
from deepseek_export.bundle.manifest import FileEntry
from deepseek_export.checkpoint.recipe import Recipe, materialize
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress
from deepseek_export.units import size
from deepseek_export.version import __version__

WEIGHTS_FILE = f"{WEIGHTS_FOLDER}/model.safetensors"
#: 至少写这么多才落盘、记一笔日志。
SYNC_BYTES = 1 << 30
_ALIGNMENT = 64
_READ = 16 << 20


@dataclass(frozen=True)
class Packed:
    """写好的权重文件。

    Attributes:
        slots: initializer 名 → 在文件里的位置。
        entry: 文件的大小与 sha256。
    """

    slots: dict[str, Slot]
    entry: FileEntry


def write_packed(
    directory: Path,
    recipes: Mapping[str, Recipe],
    store: TensorStore,
    progress: Progress,
    sync_bytes: int = SYNC_BYTES,
) -> Packed:
    """按配方写权重文件；``directory`` 里若有上一次写了一半的、配方与检查点都没变，就接着写。

    Args:
        directory: bundle 目录，权重写到其中的 :data:`WEIGHTS_FILE`，日志写到 ``JOURNAL_FILE``。
        recipes: initializer 名 → 配方；按此次序写。
        store: 检查点张量。
        progress: 以字节计的进度。
        sync_bytes: 至少写这么多字节才记一笔日志。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116`` 权重有问题；``DSX-E404`` 磁盘写满。
    """
    head, slots = _layout(recipes)
    path, journal = (
        directory / WEIGHTS_FILE,
        _Journal(directory / JOURNAL_FILE, _identity(head, recipes, store)),
    )
    progress.start("写权重", sum(recipe.nbytes for recipe in recipes.values()), "bytes")
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        done = journal.read(path)
        if done:
            progress.note(f"接着上一次没写完的导出：权重已有 {size(done)}")
        with path.open("r+b" if done else "w+b") as file:
            digest = _existing(file, done, progress) if done else hashlib.sha256(head)
            if not done:
                file.write(head)
            synced = file.tell()
            for name, recipe in recipes.items():
                if slots[name].offset < done:
                    continue
                for chunk in materialize(name, recipe, store):
                    raw = chunk.reshape(-1).view(np.uint8).data
                    file.write(raw)
                    digest.update(raw)
                    progress.advance(chunk.nbytes, name)
                if file.tell() - synced >= sync_bytes:
                    synced = journal.record(file)
            total = journal.record(file)
    assert total == len(head) + sum(recipe.nbytes for recipe in recipes.values())
    return Packed(slots, FileEntry(bytes=total, sha256=digest.hexdigest()))


def copy_packed(
    directory: Path,
    location: str,
    recipes: Mapping[str, Recipe],
    slots: Mapping[str, Slot],
    source: Path,
    progress: Progress,
) -> Packed:
    """从打包好的权重文件里拷出一部分，成为另一个同样格式的文件；逐块拷，不经过配方。

    Args:
        directory: 新的 bundle 目录。
        location: 新文件，相对 ``directory``。
        recipes: 要拷的 initializer 名 → 配方；按此次序写。
        slots: 它们现在在哪里，文件相对 ``source``。
        source: 原来的 bundle 目录。
        progress: 以字节计的进度，已经开始。

    Raises:
        DsxError: ``DSX-E404`` 磁盘写满；``DSX-E406`` 原来的文件变短了。
    """
    head, made = _layout(recipes, location)
    path, digest = directory / location, hashlib.sha256(head)
    with disk_errors(path), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = stack.enter_context(path.open("wb"))
        target.write(head)
        opened: dict[str, BinaryIO] = {}
        for name in recipes:
            slot = slots[name]
            if slot.location not in opened:
                opened[slot.location] = stack.enter_context((source / slot.location).open("rb"))
            file, left = opened[slot.location], slot.length
            file.seek(slot.offset)
            while left:
                block = file.read(min(left, _READ))
                if not block:
                    raise DsxError("DSX-E406", f"{source / slot.location} 在拷 {name} 时变短了", "重新导出")
                target.write(block)
                digest.update(block)
                left -= len(block)
                progress.advance(len(block), name)
        target.flush()
        os.fsync(target.fileno())
        total = target.tell()
    return Packed(made, FileEntry(bytes=total, sha256=digest.hexdigest()))


def _layout(recipes: Mapping[str, Recipe], location: str = WEIGHTS_FILE) -> tuple[bytes, dict[str, Slot]]:
    """文件头（含开头的长度），与每个 initializer 在 ``location`` 里的位置；只由配方决定。"""
    header: dict[str, dict] = {}
    end = 0
    for name, recipe in recipes.items():
        start, end = end, end + recipe.nbytes
        shape = list(recipe.shape)
        if recipe.dtype == "int4":
            shape[-1] //= 2  # safetensors 没有 int4，写的是字节
        header[name] = {
            "dtype": DTYPES[recipe.dtype].safetensors,
            "shape": shape,
            "data_offsets": [start, end],
        }
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-(8 + len(blob)) % _ALIGNMENT)  # 规范允许头部以空格结尾；数据区从 64 字节边界开始
    head = len(blob).to_bytes(8, "little") + blob
    slots = {
        name: Slot(location, len(head) + entry["data_offsets"][0], recipes[name].nbytes)
        for name, entry in header.items()
    }
    return head, slots


def _identity(head: bytes, recipes: Mapping[str, Recipe], store: TensorStore) -> str:
    """这份权重文件的身份：dsx 版本、布局、配方、检查点（含修改时间）都相同，写出来的字节才相同。"""
    facts = {
        "dsx": __version__,
        "recipes": {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()},
        "checkpoint": store.fingerprint().model_dump(),
        "modified": [file.stat().st_mtime_ns for file in store.files],
    }
    return hashlib.sha256(head + json.dumps(facts).encode()).hexdigest()


def _existing(file: BinaryIO, done: int, progress: Progress):
    """截掉 ``done`` 之后的，重算前面的 sha256；文件停在末尾。"""
    file.truncate(done)
    digest = hashlib.sha256()
    while block := file.read(_READ):
        digest.update(block)
        progress.advance(len(block), "接着上一次")
    return digest


class _Journal:
    """权重文件里已经落盘的有多少字节；只在一个 initializer 写完时记。"""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def read(self, weights: Path) -> int:
        """能接着写就返回已落盘的字节数，否则 0；日志读不懂、身份不同、文件不够长都算不能。"""
        try:
            record = json.loads(self._path.read_bytes())
            if record["identity"] == self._identity and weights.stat().st_size >= record["bytes"]:
                return int(record["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0

    def record(self, file: BinaryIO) -> int:
        """落盘，记下写到了哪里。"""
        file.flush()
        os.fsync(file.fileno())
        position = file.tell()
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps({"identity": self._identity, "bytes": position}), encoding="utf-8")
        fresh.replace(self._path)
        return position
