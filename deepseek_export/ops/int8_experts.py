"""``dsx::Int8Experts``：权重是逐块对称的 int8 码的路由专家；参考实现先还原权重，激活不量化。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.int8_linear import dequantized
from deepseek_export.ops.moe_experts import moe_experts


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
    top, ids = log_weights.topk(k)

    def widened(codes: Tensor, scales: Tensor) -> Tensor:
        return dequantized(codes.unflatten(-1, (-1, block_size)), scales, codes.shape[-1])

    w = widened(gate_up, gate_up_scales)
    ids = ids.to(torch.int32)
    return moe_experts(x, ids, top.softmax(-1), w[:, 0::2], w[:, 1::2], widened(down, down_scales))


def fake(x, log_weights, gate_up, gate_up_scales, down, down_scales, k, block_size):
    """形状推导（meta）。"""
    return torch.empty_like(x)
