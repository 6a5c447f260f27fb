"""结束了的行离开批次：空出来的行由末尾的补上，还没结束的因此总排在最前面，一步只算它们。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deepseek_export.backend.base import Caches

Item = TypeVar("Item")


@dataclass(frozen=True)
class Packing:
    """一次压实：哪一行搬到哪一行，之后还剩几行。一份状态只能压实一次。

    Attributes:
        moves: ``(从, 到)``；``到`` 都是结束了的行，``从`` 都在剩下的行数之外。
        count: 还剩几行。
    """

    moves: tuple[tuple[int, int], ...]
    count: int

    @classmethod
    def of(cls, kept: np.ndarray) -> Packing | None:
        """``kept`` ``[B]`` bool，还没结束的行；一行也没结束时为 ``None``。"""
        count = int(kept.sum())
        if count == len(kept):
            return None
        holes = np.flatnonzero(~kept[:count]).tolist()
        tail = (count + np.flatnonzero(kept[count:])).tolist()
        return cls(tuple(zip(tail, holes, strict=True)), count)

    def array(self, array: np.ndarray) -> np.ndarray:
        """按行搬；返回剩下的行，是 ``array`` 的视图。"""
        for source, target in self.moves:
            array[target] = array[source]
        return array[: self.count]

    def items(self, items: Sequence[Item]) -> list[Item]:
        """同 :meth:`array`，一行一个对象。"""
        packed = list(items)
        for source, target in self.moves:
            packed[target] = packed[source]
        return packed[: self.count]

    def caches(self, caches: Caches, lens: np.ndarray) -> Caches:
        """搬缓存里每行的前 ``lens[b]`` 个位置；返回剩下的行的视图，一行不剩时原样返回。"""
        for source, target in self.moves:
            caches.copy_row(source, target, int(lens[source]))
        return caches.first(self.count) if self.count else caches
