"""``rejection`` 模式在主机上的随机量：抽草稿，并给图内验证备好均匀随机数。"""

from __future__ import annotations

import numpy as np

from deepseek_export.runtime.sampling import SamplingParams, unusable_logits
from deepseek_export.runtime.session import Chance


class RowChance:
    """每行一个独立的发生器，第 b 行由 ``seed + b`` 播种。

    Args:
        params: 采样参数，温度大于 0，不带 top-k / top-p。
        batch: 行数 B。
        num_draft_tokens: 每次至多几个草稿。
        vocab_size: 词表大小 V。
    """

    def __init__(self, params: SamplingParams, batch: int, num_draft_tokens: int, vocab_size: int) -> None:
        self.temperature = params.temperature
        seeds = [None if params.seed is None else params.seed + row for row in range(batch)]
        self._rngs = [np.random.default_rng(seed) for seed in seeds]
        self._probs = np.zeros((batch, num_draft_tokens, vocab_size), np.float32)

    def choose(self, position: int, logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """给 ``rows`` 里为真的行各抽一个草稿，并记住从什么分布里抽的。

        Args:
            position: 第几个草稿，从 0 数。
            logits: ``[B, V]``。
            rows: ``[B]`` bool，其余行给 0。

        Returns:
            ``[B]`` int64。

        Raises:
            DsxError: ``DSX-E505``，logits 无法采样。
        """
        picked = np.zeros(len(rows), np.int64)
        for row in np.flatnonzero(rows).tolist():
            scores = logits[row].astype(np.float64)
            peak = scores.max()
            if not np.isfinite(peak):
                raise unusable_logits(row, float(peak))
            probs = np.exp((scores - peak) / self.temperature)
            # 抽样用的必须就是交给图去验证的那个 float32 分布。
            self._probs[row, position] = probs / probs.sum()
            cumulative = np.cumsum(self._probs[row, position], dtype=np.float64)
            aim = self._rngs[row].random() * cumulative[-1]
            picked[row] = min(int(np.searchsorted(cumulative, aim, side="right")), len(cumulative) - 1)
        return picked

    def draw(self, num_drafts: int, rows: np.ndarray) -> Chance:
        """``num_drafts`` 个草稿的一次验证要的随机量；``rows`` 之外的行不消耗随机数。"""
        uniform = np.zeros((len(rows), num_drafts + 1), np.float32)
        for row in np.flatnonzero(rows).tolist():
            uniform[row] = self._rngs[row].random(num_drafts + 1, dtype=np.float32)
        return Chance(self._probs[:, :num_drafts], uniform, self.temperature)
