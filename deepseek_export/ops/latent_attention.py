"""``dsx::LatentAttention``：absorb 形式的 MLA 注意力核，由 ``tensorrt`` / ``tensorrt-rtx`` 的下沉产生，捕获的图里没有。

它前面是吸收 W_UK 的 MatMul 与写缓存的 ``TensorScatter``，后面是 W_UV 的 MatMul，都用 TensorRT 自己的层。
"""

from __future__ import annotations

from torch import Tensor

from deepseek_export.ops.mla_attention import attend_latent


def latent_attention(
    q: Tensor, kv_cache: Tensor, past_lens: Tensor, scale: float | Tensor, kv_lora_rank: int
) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.LATENT_ATTENTION`。

    Returns:
        context [H, B*S, r]，dtype 同 ``q``。
    """
    context = attend_latent(q.transpose(1, 2), kv_cache, past_lens, scale, kv_lora_rank)
    B, S, H, _ = q.shape
    return context.transpose(0, 1).reshape(H, B * S, kv_lora_rank)


def fake(q, kv_cache, past_lens, scale, kv_lora_rank):
    """形状推导（meta）。"""
    return q.new_empty(q.shape[2], q.shape[0] * q.shape[1], kv_lora_rank)
