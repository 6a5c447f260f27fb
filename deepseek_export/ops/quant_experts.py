"""``dsx::Int8Experts``、``dsx::Int4Experts``：权重是逐块对称的码的路由专家；参考实现先还原权重，激活不量化。"""

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


def _experts(
    x: Tensor,
    log_weights: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    k: int,
    block_size: int,
    bits: int,
) -> Tensor:
    top, ids = log_weights.topk(k)

    def widened(codes: Tensor, scales: Tensor) -> Tensor:
        blocks = codes.unflatten(-1, (-1, block_size * bits // 8))
        return dequantized(blocks, scales, bits, codes.shape[-1] * 8 // bits)

    w = widened(*gate_up)
    return moe_experts(x, ids.to(torch.int32), top.softmax(-1), w[:, 0::2], w[:, 1::2], widened(*down))


def fake(x, log_weights, gate_up, gate_up_scales, down, down_scales, k, block_size):
    """形状推导（meta）。"""
    return torch.empty_like(x)
