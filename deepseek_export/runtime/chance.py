"""``rejection`` 模式在主机上的随机量：抽草稿，并给图内验证备好均匀随机数。

一行的结果只能由它自己决定，而同批各行的草稿一样多、一次验证。所以每行有自己的草稿数：多出来的那些只是占位，
给它们的随机量让图必定拒绝第一个、随即照主模型的分布采样，与没有提出过一样。
"""

from __future__ import annotations

import numpy as np

from deepseek_export.runtime.packing import Packing
from deepseek_export.runtime.randomness import Use, row_streams
from deepseek_export.runtime.sampling import SamplingParams, unusable_logits
from deepseek_export.runtime.session import Chance

#: 占位的草稿是 token 0。图接受 u·q < p 的：u·q = 3.5 大于任何概率，必被拒绝；q 又小得让残差 p - q 在 float32 里就是 p。
_REFUSED_UNIFORM, _REFUSED_PROB = np.float32(3e38), np.finfo(np.float32).tiny


class RowChance:
    """每行一份按位置取的随机数，第 b 行的种子是 ``seed + b``。

    Args:
        params: 采样参数，温度大于 0，不带 top-k / top-p。
        batch: 行数 B。
        num_draft_tokens: 每次至多几个草稿。
        vocab_size: 词表大小 V。
    """

    def __init__(self, params: SamplingParams, batch: int, num_draft_tokens: int, vocab_size: int) -> None:
        self.temperature = params.temperature
        self._streams = row_streams(params.seed, batch)
        self._probs = np.zeros((batch, num_draft_tokens, vocab_size), np.float32)

    def pack(self, packing: Packing) -> None:
        """结束了的行离开批次。"""
        self._streams, self._probs = packing.items(self._streams), packing.array(self._probs)

    def choose(self, step: int, positions: np.ndarray, logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """给 ``rows`` 里为真的行各抽一个草稿，并记住从什么分布里抽的。

        Args:
            step: 这一轮的第几个草稿，从 0 数。
            positions: ``[B]``，这个草稿在整条序列里的下标。
            logits: ``[B, V]``。
            rows: ``[B]`` bool，其余行给 0，也就是占位。

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
            self._probs[row, step] = probs / probs.sum()
            cumulative = np.cumsum(self._probs[row, step], dtype=np.float64)
            (aim,) = self._streams[row].uniforms(Use.DRAFT, int(positions[row])) * cumulative[-1]
            picked[row] = min(int(np.searchsorted(cumulative, aim, side="right")), len(cumulative) - 1)
        return picked

    def draw(self, positions: np.ndarray, counts: np.ndarray, num_drafts: int, rows: np.ndarray) -> Chance:
        """一次验证要的随机量。

        一轮的最后一个 token 由哪个位置上的随机数来选，取决于这一轮从哪里开始，而不是停在哪里：图要在接受几个还不知道时就拿到它。
        每轮开始的位置都不同，所以没有一个数用两次。被拒绝之后的草稿，它们的随机数没有影响过结果，下一轮照旧能用。

        Args:
            positions: ``[B]``，这次定下的第一个 token 在整条序列里的下标。
            counts: ``[B]``，每行真正提出了几个草稿，不超过 ``num_drafts``；其余是占位。
            num_drafts: 同批一共几个草稿 K，可以为 0。
            rows: ``[B]`` bool，其余行的结果没有人要。
        """
        uniform = np.zeros((len(rows), num_drafts + 1), np.float32)
        for row in np.flatnonzero(rows).tolist():
            stream, position, count = self._streams[row], int(positions[row]), int(counts[row])
            uniform[row, :count] = _rounded_down(stream.uniforms(Use.ACCEPT, position, count))
            uniform[row, -1:] = _rounded_down(stream.uniforms(Use.NEXT, position))
            if count < num_drafts:
                uniform[row, count:-1] = _REFUSED_UNIFORM
                self._probs[row, count:num_drafts] = 0
                self._probs[row, count:num_drafts, 0] = _REFUSED_PROB
        return Chance(self._probs[:, :num_drafts], uniform, self.temperature)


def _rounded_down(uniform: np.ndarray) -> np.ndarray:
    """float64 → float32 放得下的 24 位，向下取：四舍五入会得到 1，而图要的是小于 1 的数。"""
    return np.floor(uniform * 2.0**24) * 2.0**-24
