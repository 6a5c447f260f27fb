"""缓存的各行归谁：正在生成的挤在最前面，其后是正在算提示词的、留着前缀的与空着的。

一行的位置会变，内容随它搬，所以别处只认 :class:`Held`，不记行号。每次搬动只复制已有的长度，不复制整行。
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.runtime.packing import Packing
from deepseek_export.serving.prefix import PrefixTree


@dataclass(eq=False)
class Held:
    """一行缓存与里面的序列。

    Attributes:
        row: 现在是第几行。
        salt: 哪一家的。
        tokens: 记进前缀树的部分；还没有记就是空的。
        finished: 已经没有请求在用，只为前缀留着。
        used: 最近一次用到的次序，越大越近。
    """

    row: int
    salt: str
    tokens: np.ndarray
    finished: bool = False
    used: int = 0


class RowTable:
    """全部的行。

    Args:
        caches: 主模型的缓存与各草稿模型的，行数相同，一起搬。
        reuse: 用不用现成的前缀；不用就什么也不留。
        redo: 接着用一段前缀时，末尾要重算几个位置。
        arrays: 与行一起搬的数组，第 0 维都是行数。

    Attributes:
        active: 正在生成的有几行，占着第 ``0 .. active-1`` 行。
        lengths: ``[R]`` int64，每行的主模型缓存里有几个位置。
        names: ``[R]`` int64，每行的编号：随内容一起搬，所以一段内容的编号不变。
    """

    def __init__(
        self, caches: Sequence[Caches], reuse: bool, redo: int = 0, arrays: Sequence[np.ndarray] = ()
    ) -> None:
        count = caches[0].batch
        self.active = 0
        self.lengths, self.names = np.zeros(count, np.int64), np.arange(count)
        self._caches, self._arrays = tuple(caches), (self.lengths, self.names, *arrays)
        self._reuse, self._redo = reuse, redo
        self._held: list[Held | None] = [None] * count
        self._tree: PrefixTree[Held] = PrefixTree()
        self._clock = itertools.count(1)

    @property
    def resident(self) -> int:
        """有几行只为前缀留着。"""
        return sum(held is not None and held.finished for held in self._held)

    def admit(self, prompt: np.ndarray, salt: str) -> Held:
        """给一条新序列一行，把现成的前缀放进去；它有多长看 ``lengths``。

        1. 公共前缀最长的一行，多半是这段对话的上一轮：它已经结束，而且整行都用得上，就直接接着用，不复制。
        2. 否则另取一行，把公共前缀复制过去，原来的那一行留着。取空着的，没有就取最久没有用到的。
        3. 除了公共前缀那一行以外没有别的行可取，就截短它。

        至少留提示词的最后一个 token 重算：要它的 logits。有草稿模型的，公共前缀的末尾还要重算 ``redo`` 个。
        """
        source, reused = self._match(prompt, salt)
        kept = 0
        if source is not None and self._whole(source, reused):
            target, kept = source.row, reused
            self._forget(source)
        else:
            target = self._vacate(source)
            if source is not None and source.row == target:
                kept = reused
        held = self._held[target] = Held(target, salt, prompt[:0])
        self.lengths[target] = kept
        # 算完就要排到正在生成的后面。现在就去，占着那里的前缀让开：这一行还短，搬起来最省。
        self._swap(target, self.active)
        if source is not None and kept < reused:
            for caches in self._caches:
                caches.copy_row(source.row, held.row, reused)
            self.lengths[held.row] = reused
        return held

    def join(self, held: Held, tokens: np.ndarray) -> None:
        """提示词 ``tokens`` 算完了，开始生成：搬到正在生成的末尾，别的请求从此可以用它的前缀。"""
        self._swap(held.row, self.active)
        self.active += 1
        self._remember(held, tokens)

    def pack(self, kept: np.ndarray) -> Packing | None:
        """``kept`` ``[active]`` 为假的行不再生成；其余的仍挤在最前面。离开的行先交给 :meth:`retire` 或 :meth:`drop`。"""
        packing = Packing.of(kept)
        if packing is not None:
            for source, target in packing.moves:
                self._swap(source, target)
            self.active = packing.count
        return packing

    def retire(self, held: Held, tokens: np.ndarray) -> None:
        """不再生成；``tokens`` 是可以给以后的请求当前缀的，比 ``lengths`` 短就截短。"""
        length = min(int(self.lengths[held.row]), len(tokens))
        if not self._reuse or length == 0:
            self.drop(held)
            return
        self.lengths[held.row] = length
        self._forget(held)
        self._held[held.row] = held
        self._remember(held, tokens[:length])
        held.finished, held.used = True, next(self._clock)

    def drop(self, held: Held) -> None:
        """不再生成，内容也不留。"""
        self._forget(held)
        self.lengths[held.row] = 0

    def named(self, name: int) -> tuple[int, Held | None]:
        """编号为 ``name`` 的现在是第几行、谁占着；空着为 ``None``。"""
        (row,) = np.flatnonzero(self.names == name).tolist()
        return row, self._held[row]

    def clear(self, row: int) -> None:
        """第 ``row`` 行不要了；它不能正在用。"""
        if (held := self._held[row]) is not None:
            self._forget(held)
        self.lengths[row] = 0

    def place(self, row: int, salt: str, tokens: np.ndarray) -> None:
        """第 ``row`` 行的缓存里已经放好了 ``tokens``，留给以后的请求；它不能正在用。"""
        self.clear(row)
        held = self._held[row] = Held(row, salt, tokens[:0], finished=True, used=next(self._clock))
        self.lengths[row] = len(tokens)
        self._remember(held, tokens)

    def held(self, row: int) -> Held:
        """占着第 ``row`` 行的；那一行不能空着。"""
        found = self._held[row]
        if found is None:
            raise ValueError(f"第 {row} 行空着")
        return found

    def _match(self, prompt: np.ndarray, salt: str) -> tuple[Held | None, int]:
        """用哪一行的前缀、用多长。"""
        if not self._reuse:
            return None, 0
        length, candidates = self._tree.longest(salt, prompt)
        reused = min(length - self._redo, len(prompt) - 1)
        if reused <= 0:
            return None, 0
        chosen = next((one for one in candidates if self._whole(one, reused)), candidates[-1])
        chosen.used = next(self._clock)
        return chosen, reused

    def _whole(self, held: Held, reused: int) -> bool:
        """接着用这一行，除了要重算的那一个以外什么也不丢。"""
        return held.finished and reused + self._redo + 1 >= len(held.tokens)

    def _vacate(self, source: Held | None) -> int:
        """腾出一行：空着的，或最久没有用到的；``source`` 留到最后。"""
        if None in self._held[self.active :]:
            return self._held.index(None, self.active)
        finished = [one for one in self._held if one is not None and one.finished]
        oldest = min(finished, key=lambda one: (one is source, one.used))
        self._forget(oldest)
        return oldest.row

    def _remember(self, held: Held, tokens: np.ndarray) -> None:
        if self._reuse:
            held.tokens = tokens
            self._tree.insert(held.salt, tokens, held)

    def _forget(self, held: Held) -> None:
        """这一行空着了。"""
        if len(held.tokens):
            self._tree.remove(held.salt, held.tokens, held)
            held.tokens = held.tokens[:0]
        self._held[held.row] = None

    def _swap(self, one: int, two: int) -> None:
        """两行对调，短的那一行经过主机；有一行空着就只复制一次。"""
        if one == two:
            return
        short, long = (one, two) if self.lengths[one] <= self.lengths[two] else (two, one)
        length = int(self.lengths[short])
        for caches in self._caches:
            saved = caches.save_row(short, length) if length else None
            caches.copy_row(long, short, int(self.lengths[long]))
            if saved is not None:
                caches.restore_row(long, saved)
        for array in self._arrays:
            array[[one, two]] = array[[two, one]]
        self._held[one], self._held[two] = self._held[two], self._held[one]
        for row in (one, two):
            if (held := self._held[row]) is not None:
                held.row = row
