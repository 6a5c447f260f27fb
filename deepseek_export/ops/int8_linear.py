"""``dsx::Int8Linear``：权重是逐块对称的 int8 码的线性层；参考实现先还原权重，激活不量化。"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dequantized(codes: Tensor, scales: Tensor, width: int) -> Tensor:
    """码 → 权重。

    Args:
        codes: [..., ceil(width/block), block] uint8，零点 128，最后一块补满。
        scales: [..., ceil(width/block)]。
        width: 输入维。

    Returns:
        [..., width] float32。
    """
    return ((codes.float() - 128) * scales.unsqueeze(-1)).flatten(-2)[..., :width]


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, K: int, N: int, block_size: int) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.INT8_LINEAR`。

    Returns:
        y [..., N]。
    """
    return F.linear(x, dequantized(codes, scales, K))


def fake(x, codes, scales, K, N, block_size):
    """形状推导（meta）。"""
    return x.new_empty(*x.shape[:-1], N)
