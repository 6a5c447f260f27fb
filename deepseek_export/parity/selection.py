"""稀疏注意力选了哪些 key：集合的一致程度是单独的一个量；分数几乎相等时换一个不是错误，要与真正的错误分开报告。

选择写成 0/1 的遮罩来比：余弦型差异 ``1 - 2<x,y>/(|x|²+|y|²)`` 正好是两个集合的 Dice 距离，1 减去它就是一致程度。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepseek_export.ops.lightning_indexer import index_scores, update_index_cache
from deepseek_export.parity.tolerances import ROUTER_MARGIN, SELECTION_BAND, Dtype

if TYPE_CHECKING:  # 参考模型要 pydantic，验收 GPU 的机器上没有
    from deepseek_export.reference.model import DecoderLayer


@dataclass(frozen=True)
class Ranking:
    """参考模型在一层里给每个 key 打的分。

    Attributes:
        scores: [B, S, T] float32，看不见的是 -inf。
        topk: 选几个。
    """

    scores: Tensor
    topk: int

    @classmethod
    def of(cls, q: Tensor, w: Tensor, index_cache: Tensor, past_lens: Tensor, topk: int) -> Ranking:
        """由索引器的输入打分；``index_cache`` 已写入新行，其余参数见 ``LIGHTNING_INDEXER``。"""
        last = past_lens[:, None] + torch.arange(q.shape[1])
        hidden = torch.arange(index_cache.shape[2]) > last[:, :, None]
        return cls(index_scores(q, w, index_cache).masked_fill(hidden, float("-inf")), topk)

    @property
    def margin(self) -> Tensor:
        """[B, S]：第 topk 名与下一名之差，除以这一行分数的最大绝对值；不必排名的行是 inf。"""
        if self.scores.shape[-1] <= self.topk:
            return torch.full(self.scores.shape[:-1], torch.inf)
        best = self.scores.topk(self.topk + 1, -1).values
        gap = (best[..., -2] - best[..., -1]) / self._scale()[..., 0]
        return torch.where(best[..., -1].isinf(), torch.inf, gap)

    def without_ties(self, got: np.ndarray, want: np.ndarray, band: float) -> tuple[np.ndarray, int]:
        """``got`` 与 ``want`` 不同的地方，分数全都离第 topk 名不到 ``band`` 的 query，换成 ``want`` 的。

        Args:
            got, want: [B, S, T] 的 0/1 遮罩。
            band: 相对于这一行分数的最大绝对值。

        Returns:
            换过的遮罩，与换了的 query 数；个数不同的 query 不换。
        """
        if self.scores.shape[-1] <= self.topk:
            return got, 0
        last = self.scores.topk(self.topk, -1).values[..., -1:]
        near = ((self.scores - last).abs() <= band * self._scale()).numpy()
        different = got != want
        tied = different.any(-1) & (~different | near).all(-1) & (got.sum(-1) == want.sum(-1))
        return np.where(tied[..., None], want, got), int(tied.sum())

    def _scale(self) -> Tensor:
        finite = self.scores.masked_fill(self.scores.isinf(), 0.0)
        return finite.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def ranking(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, past_lens: Tensor, caches: tuple[Tensor, ...]
) -> Ranking | None:
    """参考模型的一层怎么排名；不自己排名的层是 ``None``。参数同 :meth:`DecoderLayer.step`，缓存是更新之前的。"""
    attention = layer.self_attn
    if attention.indexer is None:
        return None
    normed = layer.input_layernorm(x)
    q, w, k = attention.indexer.project(normed, attention.query_latent(normed), cos, sin)
    cache = update_index_cache(k, caches[-1], past_lens)
    return Ranking.of(q, w, cache, past_lens, attention.indexer.indexer.topk)


def mask_of(indices: np.ndarray, T: int) -> np.ndarray:
    """[B, S, topk] 的位置（-1 是没有）→ [B, S, T] 的 0/1 遮罩，float32。"""
    mask = np.zeros((*indices.shape[:2], T + 1), np.float32)
    np.put_along_axis(mask, np.where(indices < 0, T, indices).astype(np.int64), 1.0, axis=-1)
    return mask[..., :T]


def in_router_units(margin: Tensor, band: Dtype, router: Dtype) -> Tensor:
    """选择的近平局（并列带取 ``band`` 的）换算成路由的单位：都小于 ``ROUTER_MARGIN[router]`` 时才算近平局。"""
    return margin * (ROUTER_MARGIN[router] / SELECTION_BAND[band])
