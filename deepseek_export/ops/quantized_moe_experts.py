"""``dsx::QuantizedMoeExperts``：权重是码的路由专家；参考实现先还原权重，舍入到 ``x`` 的 dtype。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.coded_weights import widened
from deepseek_export.ops.moe_experts import moe_experts


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
    block_rows: int,
    e4m3: int,
) -> Tensor:
    """算子的 eager 参考实现；形状与属性见 :data:`~deepseek_export.ops.table.QUANTIZED_MOE_EXPERTS`。

    Returns:
        y [N, D]，dtype 同 ``x``。
    """
    pairs = ((w_gate, w_gate_scales), (w_up, w_up_scales), (w_down, w_down_scales))
    weights = (widened(*pair, block_size, block_rows, e4m3, x.dtype) for pair in pairs)
    return moe_experts(x, topk_ids, topk_weights, *weights)


def fake(x, *arguments):
    """形状推导（meta）。"""
    return torch.empty_like(x)
