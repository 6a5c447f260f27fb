"""缓存在各 stage 那里；这里只有编号、行号与长度。"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from deepseek_export.backend.base import Caches, CachesLost, SavedRow
from deepseek_export.backend.contract import CacheSpec
from deepseek_export.cluster.gang import Gang
from deepseek_export.cluster.wire import Frame

_numbers = itertools.count(1)


class _Storage:
    """各 stage 上同一个编号的缓存；视图与它的主人共用。

    整套 stage 断了又起来，内容就没有了：下一次用它抛一次 :class:`CachesLost`，再下一次在新的那一套上重新分配。

    Attributes:
        capacity: 当前的 T。
    """

    def __init__(self, gang: Gang, graph: str, batch: int, needed: int) -> None:
        self.gang = gang
        self._graph, self._batch, self.capacity = graph, batch, needed
        self.number = 0
        self.generation: int | None = None
        self._allocate()

    def call(self, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Frame:
        """在各 stage 上做一件事。"""
        (found,) = self.call_all([Frame(meta, arrays or {})])
        return found

    def call_all(self, frames: list[Frame]) -> list[Frame]:
        """依次做几件，几个 stage 同时在做；``caches`` 由这里填。"""
        if self.generation is None:
            self._allocate()
        numbered = [Frame({"caches": self.number, **frame.meta}, frame.arrays) for frame in frames]
        try:
            return self.gang.call(numbered, self.generation)
        except CachesLost:
            self.generation = None
            raise

    def _allocate(self) -> None:
        # 编号从不重复：说“不要了”的话迟到了，也不会说中别人。
        self.number, generation = next(_numbers), self.gang.generation
        meta = {"op": "new", "graph": self._graph, "caches": self.number, "batch": self._batch}
        (made,) = self.gang.call([Frame({**meta, "needed": self.capacity})], generation)
        self.capacity = int(made.meta["capacity"])
        self.generation = generation
        weakref.finalize(self, _discard, weakref.ref(self.gang), "free", self.number)


class KeptRow(Mapping[str, np.ndarray]):
    """存下的一行，留在各 stage 那里；真的要看内容才取过来。写回同一套 stage 时不经过这里。"""

    def __init__(self, storage: _Storage, number: int) -> None:
        self.number, self.generation = number, storage.generation
        self._storage, self._fetched = storage, cast(SavedRow | None, None)
        weakref.finalize(self, _discard, weakref.ref(storage.gang), "forget", number)

    def is_at(self, storage: _Storage) -> bool:
        """``storage`` 所在的那一套 stage 里还有没有它。"""
        return storage.gang is self._storage.gang and storage.generation == self.generation

    def __getitem__(self, name: str) -> np.ndarray:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    @property
    def _content(self) -> SavedRow:
        if self._fetched is None:
            if not self.is_at(self._storage):
                raise CachesLost("DSX-E747", "存下的那一行随那一套 stage 没有了", "重新提交")
            self._fetched = self._storage.call({"op": "fetch", "kept": self.number}).arrays
        return self._fetched


class PipelineCaches(Caches):
    """一套 stage 的缓存；操作沿环走一圈，与算一步的先后在每个 stage 上都一样。"""

    def __init__(self, spec: CacheSpec, batch: int, storage: _Storage, start: int = 0) -> None:
        super().__init__(spec, batch)
        self.storage, self.start = storage, start

    @classmethod
    def allocate(cls, gang: Gang, graph: str, spec: CacheSpec, batch: int, needed: int) -> PipelineCaches:
        """在各 stage 上分配清零的缓存。

        Args:
            gang: 哪一套 stage。
            graph: 给哪一张图，图的文件名。
            spec: 有哪些张量，各 stage 的合在一起。
            batch, needed: 行数；至少多少个位置。

        Raises:
            DsxError: 同 :meth:`Runner.new_caches`；``DSX-E742`` / ``DSX-E743``，流水线断了。
        """
        return cls(spec, batch, _Storage(gang, graph, batch, needed))

    @property
    def capacity(self) -> int:
        return self.storage.capacity

    def ensure(self, needed: int) -> bool:
        if needed <= self.storage.capacity:
            return False
        found = self.storage.call({"op": "ensure", "needed": needed})
        self.storage.capacity = int(found.meta["capacity"])
        return True

    def view(self, start: int, count: int) -> PipelineCaches:
        return PipelineCaches(self.spec, count, self.storage, self.start + start)

    def copy_row(self, source: int, target: int, length: int, origin: Caches | None = None) -> None:
        given = self if origin is None else cast(PipelineCaches, origin)  # 同一个 Runner 分配的
        meta = {"op": "copy", "source": given.start + source, "target": self.start + target, "length": length}
        self.storage.call({**meta, "origin": given.storage.number})

    def clear_row(self, row: int) -> None:
        self.storage.call({"op": "clear", "row": self.start + row})

    def save_row(self, row: int, length: int) -> SavedRow:
        number = next(_numbers)
        self.storage.call({"op": "save", "row": self.start + row, "length": length, "kept": number})
        return KeptRow(self.storage, number)

    def restore_row(self, row: int, saved: SavedRow) -> None:
        meta = {"op": "restore", "row": self.start + row}
        if isinstance(saved, KeptRow) and saved.is_at(self.storage):
            self.storage.call({**meta, "kept": saved.number})
        else:
            self.storage.call(meta, dict(saved))


def _discard(gang: weakref.ref[Gang], what: str, number: int) -> None:
    """没有人用了；那一套 stage 还在就记下。"""
    if (found := gang()) is not None:
        found.discard(what, number)
