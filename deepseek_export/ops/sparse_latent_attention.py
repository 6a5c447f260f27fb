"""``dsx::SparseLatentAttention``：absorb 形式的注意力核，一个 query 只看选中的行；由 ``tensorrt`` / ``tensorrt-rtx`` 的下沉产生。

与 ``dsx::LatentAttention`` 的差别只是 key 的集合；前后的原生层相同。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.mla_attention import attend_latent
from deepseek_export.ops.sparse_mla_attention import gather_rows


def sparse_latent_attention(
    q: Tensor, kv_cache: Tensor, indices: Tensor, counts: Tensor, scale: float | Tensor, kv_lora_rank: int
) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.SPARSE_LATENT_ATTENTION`。

    Returns:
        context [H, B*S, r]，dtype 同 ``q``。
    """
    B, S, H, width = q.shape
    rows, last = gather_rows(kv_cache, indices), counts.reshape(B * S).to(torch.int64) - 1
    context = attend_latent(q.reshape(B * S, H, 1, width), rows, last, scale, kv_lora_rank)
    return context.reshape(B * S, H, kv_lora_rank).transpose(0, 1).contiguous()


def fake(q, kv_cache, indices, counts, scale, kv_lora_rank):
    """形状推导（meta）。"""
    return q.new_empty(q.shape[2], q.shape[0] * q.shape[1], kv_lora_rank)
