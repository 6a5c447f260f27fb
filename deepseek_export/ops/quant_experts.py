"""``dsx::Int8Experts``、``dsx::Int4Experts``、``dsx::Int4AffineExperts``：权重是逐块的码的路由专家；参考实现先还原权重，激活不量化。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.ops.quant_linear import dequantized


def int8_experts(
    x: Tensor,
    log_weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    k: int,
    block_size: int,
) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.INT8_EXPERTS`。

    Returns:
        y [N, D]：log 权重最大的 k 个专家，按它们之上的 softmax 加权。
    """
    return _experts(x, log_weights, (gate_up, gate_up_scales), (down, down_scales), k, block_size, 8)


def int4_experts(
    x: Tensor,
    log_weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    k: int,
    block_size: int,
) -> Tensor:
    """:func:`int8_experts` 的 4 位写法；形状见 :data:`~deepseek_export.ops.table.INT4_EXPERTS`。"""
    return _experts(x, log_weights, (gate_up, gate_up_scales), (down, down_scales), k, block_size, 4)


def int4_affine_experts(
    x: Tensor,
    log_weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    gate_up_zero_points: Tensor,
    down_zero_points: Tensor,
    k: int,
    block_size: int,
) -> Tensor:
    """零点逐块给出的 :func:`int4_experts`；形状见 :data:`~deepseek_export.ops.table.INT4_AFFINE_EXPERTS`。"""
    zeros = (gate_up_zero_points, down_zero_points)
    return _experts(x, log_weights, (gate_up, gate_up_scales), (down, down_scales), k, block_size, 4, zeros)


def _experts(
    x: Tensor,
    log_weights: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    k: int,
    block_size: int,
    bits: int,
    zeros: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    top, ids = log_weights.topk(k)

    def widened(codes: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        blocks = codes.unflatten(-1, (-1, block_size * bits // 8))
        return dequantized(blocks, scales, bits, codes.shape[-1] * 8 // bits, zero_points)

    w, w_down = widened(*gate_up, zeros[0]), widened(*down, zeros[1])
    return moe_experts(x, ids.to(torch.int32), top.softmax(-1), w[:, 0::2], w[:, 1::2], w_down)


def fake(x, log_weights, gate_up, gate_up_scales, down, down_scales, k, block_size):
    """形状推导（meta）。"""
    return torch.empty_like(x)


def fake_affine(
    x,
    log_weights,
    gate_up,
    gate_up_scales,
    down,
    down_scales,
    gate_up_zero_points,
    down_zero_points,
    k,
    block_size,
):
    """形状推导（meta）。"""
    return torch.empty_like(x)
