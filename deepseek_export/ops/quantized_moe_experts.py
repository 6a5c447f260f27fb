"""``dsx::QuantizedMoeExperts``：权重是逐块对称的码的路由专家；参考实现先还原权重，舍入到 ``x`` 的 dtype。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.moe_experts import moe_experts


def widened(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """码 → 权重。

    Args:
        codes: [..., K] int8；int4 的码也各占一字节。
        scales: [..., K/block_size]。
        block_size: 沿 K 每多少个码共用一个 scale。
        dtype: 结果的 dtype；码乘 scale 在 float32 里没有误差，只在这里舍入一次。
    """
    blocks = codes.float().unflatten(-1, (-1, block_size))
    return (blocks * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantized_moe_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate: Tensor,
    w_gate_scales: Tensor,
    w_up: Tensor,
    w_up_scales: Tensor,
    w_down: Tensor,
    w_down_scales: Tensor,
    block_size: int,
) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.QUANTIZED_MOE_EXPERTS`。

    Returns:
        y [N, D]，dtype 同 ``x``。
    """
    pairs = ((w_gate, w_gate_scales), (w_up, w_up_scales), (w_down, w_down_scales))
    weights = (widened(codes, scales, block_size, x.dtype) for codes, scales in pairs)
    return moe_experts(x, topk_ids, topk_weights, *weights)


def fake(
    x, topk_ids, topk_weights, w_gate, w_gate_scales, w_up, w_up_scales, w_down, w_down_scales, block_size
):
    """形状推导（meta）。"""
    return torch.empty_like(x)
