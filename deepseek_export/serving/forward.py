"""引擎的模型调用：一块提示词，或者正在生成的各行各走一步；有草稿模型就先起草，一次验证几个。

验证只要主模型在各个草稿处的分数：接不接受由主机选（见 :mod:`.accept`），不用图里的判定，所以各行的采样参数可以各不相同。各行都只取最大的那个时，
后端选得出就不取 logits。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.runtime import DraftSession, ModelSession
from deepseek_export.runtime.scores import Scores
from deepseek_export.runtime.session import Chance
from deepseek_export.runtime.speculation.row_drafter import Choose, RowDrafter
from deepseek_export.serving.settings import FittedSettings


@dataclass(frozen=True)
class Step:
    """一步的结果；数组是缓冲区的视图，下一次调用会覆盖它们。

    Attributes:
        scores: ``[B, K+1]`` 个位置的分数，logits 是 float32，第 i 个在最新的 token 与前 i 个草稿之后。
        drafts: ``[B, K]`` int64，K 可以为 0。
        hidden: ``[B, K+1, D]``；没有草稿模型为 ``None``。
    """

    scores: Scores
    drafts: np.ndarray
    hidden: np.ndarray | None = None


class Forward:
    """主模型与草稿模型，以及它们的缓存。

    Args:
        session: 主模型。
        settings: 定下了的参数。
        drafts: 草稿模型；``settings.num_drafts`` 为 0 就不用。

    Attributes:
        caches: 主模型的缓存在前，各草稿模型的在后。
        drafter: 起草的状态；不投机为 ``None``。

    Raises:
        DsxError: ``DSX-E919``，TensorRT 引擎的一行没有对齐，不能只运行其中一行。
    """

    def __init__(
        self, session: ModelSession, settings: FittedSettings, drafts: Sequence[DraftSession] = ()
    ) -> None:
        self.drafter: RowDrafter | None = None
        self.caches: tuple[Caches, ...] = (session.new_caches(settings.rows),)
        self._session = session
        if settings.num_drafts:
            used = drafts[: settings.num_drafts]
            widest = min(module.limits.prefill_chunk for module in used)
            self.drafter = RowDrafter(used, settings.num_drafts, settings.rows, widest)
            self.caches += self.drafter.caches
        if settings.rows > 1:
            for caches in self.caches:
                caches.rows(1, 1)  # 后端做不到只运行其中一行的，现在就说
        self._most = settings.num_drafts
        self._context = settings.context
        self._first = np.zeros((settings.rows, 1), np.int64)  # 解码的一步只有一个位置
        self._none = np.empty((settings.rows, 0), np.int64)

    @property
    def redo(self) -> int:
        """接着用一段前缀时，末尾要重算几个位置。"""
        return 0 if self.drafter is None else self.drafter.redo

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """与行一起搬的数组。"""
        return () if self.drafter is None else self.drafter.arrays

    def usable(self, row: int, length: int) -> int:
        """一行缓存里的 ``length`` 个位置，前几个可以给别人当前缀。"""
        return length if self.drafter is None else min(length, self.drafter.usable(row))

    def admitted(self, row: int, length: int) -> None:
        """这一行现成的前缀有 ``length`` 个。"""
        if self.drafter is not None:
            self.drafter.restored(row, length)

    def most_drafts(self, newest: np.ndarray) -> int:
        """这一步至多几个草稿；有一行快到 ``context``，放不下就是 0：缓存不为草稿多占一档。

        Args:
            newest: ``[B]``，各行最新的 token 的下标。
        """
        return self._most if int(newest.max()) + self._most + 1 <= self._context else 0

    def prefill(self, row: int, begin: int, prompt: np.ndarray, size: int, want_logits: bool) -> Scores:
        """算一行的一块提示词。

        Args:
            row: 哪一行。
            begin: 从提示词的第几个起。
            prompt: ``[n]``，整条提示词。
            size: 至多几个。
            want_logits: 要不要 logits。

        Returns:
            这一块最后一个位置的分数，``[1, 1]`` 个位置。

        Raises:
            DsxError: 后端的错误。
        """
        part = prompt[begin : begin + size]
        self.caches[0].ensure(begin + len(part))
        view, past = self.caches[0].rows(row, 1), np.array([begin])
        last = np.array([[len(part) - 1]])
        step = self._call(part[None], past, last, self._none[:1], view, want_logits)
        if self.drafter is not None and step.hidden is not None:
            self.drafter.prefill(row, begin, prompt, step.hidden)
        return step.scores

    def decode(
        self,
        newest: np.ndarray,
        lengths: np.ndarray,
        num_drafts: int,
        choose: Choose | None,
        want_logits: bool,
    ) -> Step:
        """前 B 行各走一步。

        Args:
            newest: ``[B]``，各行最新的 token，还没有送进模型。
            lengths: ``[B]``，各行的缓存里有几个位置。
            num_drafts: 起草几个 K，可以为 0。
            choose: 怎么选草稿，见 :meth:`RowDrafter.propose`。
            want_logits: 有没有一行要 logits。

        Raises:
            DsxError: 后端的错误。
        """
        count, ids = len(newest), newest[:, None]
        drafts, positions = self._none[:count], self._first[:count]
        if num_drafts and self.drafter is not None:
            drafts = self.drafter.propose(lengths, num_drafts, choose)
            ids = np.concatenate([ids, drafts], axis=1)
            positions = np.broadcast_to(np.arange(num_drafts + 1), ids.shape)
        self.caches[0].ensure(int(lengths.max()) + ids.shape[1])
        return self._call(ids, lengths, positions, drafts, self.caches[0].first(count), want_logits)

    def _call(
        self,
        ids: np.ndarray,
        past: np.ndarray,
        positions: np.ndarray,
        drafts: np.ndarray,
        view: Caches,
        want_logits: bool,
    ) -> Step:
        session, (batch, count) = self._session, drafts.shape
        if self.drafter is None:
            return Step(session.scores(ids, past, positions, view, want_logits), drafts)
        chance = None
        if session.verify_mode == "rejection":  # 图里的判定没有人要，随机量填什么都行
            probs = np.broadcast_to(np.float32(0), (batch, count, session.vocab_size))
            chance = Chance(probs, np.zeros((batch, count + 1), np.float32), 1.0)
        got = session.verify(ids, past, positions, drafts, view, chance, want_logits)
        return Step(session.widened(got.scores, view), drafts, got.hidden)
