"""``dsx::QuantizedLinear``：权重是码的线性层；参考实现先还原权重，舍入到 ``x`` 的 dtype。"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deepseek_export.ops.coded_weights import widened


def quantized_linear(
    x: Tensor, w: Tensor, w_scales: Tensor, block_size: int, block_rows: int, e4m3: int
) -> Tensor:
    """算子的 eager 参考实现；形状与属性见 :data:`~deepseek_export.ops.table.QUANTIZED_LINEAR`。

    Returns:
        y [B, S, N]，dtype 同 ``x``。
    """
    return F.linear(x, widened(w, w_scales, block_size, block_rows, e4m3, x.dtype))


def fake(x, w, w_scales, block_size, block_rows, e4m3):
    """形状推导（meta）。"""
    return x.new_empty((*x.shape[:-1], w.shape[0]))
