"""用 MTP 模块起草：维护各模块的缓存，并留住重算所需的最后几行主模型 hidden。

记 t_0..t_n 已知、h_0..h_{n-1} 已算出。模块 j 缓存的第 i 行由 (t_{i+j+1}, 前一级的 hidden 第 i 行) 算出，
模块 0 的前一级是主模型。模块 j 在第 n-1 行预测 t_{n+j+1}，即第 j+1 个草稿；模块用完之后，最后一个模块
拿自己的 hidden 递归，写在第 n 行及以后。用到草稿 token 的行在验证之后不一定还对，每轮从可能不对的
第一行起重算，回滚因此只需要忘掉长度。
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_export.runtime.batching import Chunk
from deepseek_export.runtime.chance import RowChance
from deepseek_export.runtime.draft import Drafted, DraftSession
from deepseek_export.runtime.packing import Packing


class Drafter:
    """一个批次的起草状态。

    Args:
        drafts: 各模块，按顺序；多于草稿数的用不上。
        num_draft_tokens: 每轮至多几个草稿。
        tokens: ``[B, W]`` int64，已知的 token；起草时会在最新 token 之后临时写草稿，
            W 至少比最终长度多 ``num_draft_tokens + 1``。
        lens: ``[B]``，提示词长度。
        chance: ``rejection`` 模式抽草稿用；``greedy`` 模式为 ``None``。
        max_plain_rounds: 两次 :meth:`propose` 之间，主模型至多自己走这么多步。

    Attributes:
        calls: :meth:`propose` 调了几次草稿模型。
    """

    def __init__(
        self,
        drafts: Sequence[DraftSession],
        num_draft_tokens: int,
        tokens: np.ndarray,
        lens: np.ndarray,
        chance: RowChance | None,
        max_plain_rounds: int = 0,
    ) -> None:
        batch = len(lens)
        self.calls = 0
        self._modules = list(drafts[:num_draft_tokens])
        self._caches = [module.new_caches(batch, int(lens.max())) for module in self._modules]
        self._tokens = tokens
        self._chance = chance
        self._kept = num_draft_tokens + len(self._modules) + max_plain_rounds  # 一轮最多重算这么多行
        self._recent: np.ndarray | None = None  # [B, kept, D]，每行最后 kept 个主模型 hidden，靠右对齐
        self._done = lens - 1  # 上一次起草时最新 token 的下标
        self._drafts = np.zeros((batch, num_draft_tokens), np.int64)
        self._rows = np.arange(batch)

    def prefill(self, part: Chunk, hidden: np.ndarray) -> None:
        """主模型走完一块提示词之后，让各模块也走完。

        提示词末尾几行要的 token 还不知道，先填占位，第一次 :meth:`propose` 会重算它们。

        Args:
            part: 这一块。
            hidden: ``[B, S, D]``，主模型在这一块上的 hidden。
        """
        width = part.input_ids.shape[1]
        positions = np.zeros((len(self._rows), 1), np.int64)
        self.observe(hidden, part.counts)
        for index, (module, caches) in enumerate(zip(self._modules, self._caches, strict=True)):
            first = part.start + index + 1
            ids = self._tokens[:, first : first + width]
            hidden = module.run(ids, hidden, part.past_lens, positions, caches).hidden

    def observe(self, hidden: np.ndarray, counts: np.ndarray) -> None:
        """记住主模型新算出的 hidden：每行取前 ``counts[b]`` 个。"""
        if self._recent is None:
            self._recent = np.zeros((len(self._rows), self._kept, hidden.shape[2]), hidden.dtype)
        for row, count in enumerate(counts.tolist()):
            new = min(count, self._kept)
            if new:
                self._recent[row, :-new] = self._recent[row, new:]
                self._recent[row, -new:] = hidden[row, count - new : count]

    def pack(self, packing: Packing, tokens: np.ndarray, lens: np.ndarray) -> None:
        """结束了的行离开批次。

        Args:
            packing: 怎么搬。
            tokens: 压实之后的已知 token。
            lens: ``[B]``，压实之前每行在缓存里有多长。
        """
        self._caches = [packing.caches(caches, lens) for caches in self._caches]
        self._tokens = tokens
        self._done, self._drafts = packing.array(self._done), packing.array(self._drafts)
        self._rows = np.arange(packing.count)
        if self._recent is not None:
            self._recent = packing.array(self._recent)

    def propose(self, newest: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """起草一轮。

        每行都恰好重算到第 ``newest[b]-1`` 行为止的同样多行：批里接受得少的行多算几行旧的，结果不变，
        却不需要在末尾填充，因此写不到最大长度之外。

        Args:
            newest: ``[B]``，最新 token 的下标 n；它还没有送进主模型。
            wanted: ``[B]``，各行要几个草稿，可以为 0；同批里最多的那个数是 K，多给的只是占位。
                K 比模块数少时各模块仍然都跑，好让缓存跟上。

        Returns:
            ``[B, K]`` int64，内部缓冲区的视图。
        """
        last, num_drafts = len(self._modules) - 1, int(wanted.max())
        span = int((newest - self._done).max()) + last
        base = np.maximum(newest - span, 0)
        counts = newest - base
        width = int(counts.max())
        index = base[:, None] + np.arange(width)
        hidden = self._window(counts, width)
        positions = (counts - 1)[:, None]
        for step in range(last + 1):
            columns = np.minimum(index + step + 1, self._tokens.shape[1] - 1)
            ids = np.take_along_axis(self._tokens, columns, axis=1)
            drafted = self._step(step, step, ids, hidden, base, positions, newest, wanted)
            hidden = drafted.hidden
            # 下一个模块的末行要用这个草稿当 token。
            self._tokens[self._rows, newest + step + 1] = self._drafts[:, step]
        hidden = hidden[self._rows, counts - 1][:, None]
        end = self._modules[last].max_positions - 1
        for step in range(last + 1, num_drafts):
            # 占位的草稿会越过最大长度，压回最后一行：第 newest 行及以后下一轮都要重算，写坏了不要紧。
            past = np.minimum(newest + step - last - 1, end)
            ids = self._drafts[:, step - 1 : step]
            first = np.zeros_like(positions)
            hidden = self._step(last, step, ids, hidden, past, first, newest, wanted).hidden
        self._done = newest.copy()
        return self._drafts[:, :num_drafts]

    def _step(
        self,
        module: int,
        step: int,
        ids: np.ndarray,
        hidden: np.ndarray,
        past: np.ndarray,
        positions: np.ndarray,
        newest: np.ndarray,
        wanted: np.ndarray,
    ) -> Drafted:
        """跑一次模块，定下第 ``step`` 个草稿。"""
        caches = self._caches[module]
        caches.ensure(int(past.max()) + ids.shape[1])
        want = self._chance is not None
        drafted = self._modules[module].run(ids, hidden, past, positions, caches, want_logits=want)
        self.calls += 1
        if self._chance is None or drafted.logits is None:
            self._drafts[:, step] = drafted.draft_id
        else:
            logits = drafted.logits[:, -1]
            self._drafts[:, step] = self._chance.choose(step, newest + step + 1, logits, wanted > step)
        return drafted

    def _window(self, counts: np.ndarray, width: int) -> np.ndarray:
        """每行最后 ``counts[b]`` 个主模型 hidden，靠左对齐成 ``[B, width, D]``。"""
        if self._recent is None:
            raise ValueError("要先 prefill 再起草")
        if (counts == width).all():
            return self._recent[:, self._kept - width :]
        columns = np.minimum(self._kept - counts[:, None] + np.arange(width), self._kept - 1)
        return np.take_along_axis(self._recent, columns[:, :, None], axis=1)
