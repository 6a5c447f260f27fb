"""``dsx::IndexTopK``：索引器的打分与挑选，由 ``tensorrt`` / ``tensorrt-rtx`` 的下沉产生，捕获的图里没有。

它前面是写索引缓存的 ``TensorScatter``，用 TensorRT 自己的层；其余与 :mod:`~deepseek_export.ops.lightning_indexer` 相同。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_export.ops.lightning_indexer import choose, key_counts, last_visible, visible_scores


def index_topk(
    q: Tensor, w: Tensor, index_cache: Tensor, past_lens: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.INDEX_TOPK`。

    Returns:
        indices [B, S, topk] int32、counts [B, S] int32，见 :func:`~deepseek_export.ops.lightning_indexer.lightning_indexer`。
    """
    last = last_visible(past_lens, q)
    scores = visible_scores(q, w, index_cache, last)
    # 补上 topk 个看不见的：T 再小也不必分情形，图里没有 If。
    scores = F.pad(scores, (0, topk), value=float("-inf"))
    return choose(scores, last, topk), key_counts(past_lens, q.shape[1], topk)


def fake(q, w, index_cache, past_lens, topk):
    """形状推导（meta）。"""
    B, S = q.shape[:2]
    return q.new_empty(B, S, topk, dtype=torch.int32), q.new_empty(B, S, dtype=torch.int32)
