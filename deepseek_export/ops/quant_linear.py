"""``dsx::Int8Linear``、``dsx::Int4Linear``：权重是逐块对称的码的线性层；参考实现先还原权重，激活不量化。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, K: int, N: int, block_size: int) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.INT8_LINEAR`。

    Returns:
        y [..., N]。
    """
    return F.linear(x, dequantized(codes, scales, 8, K))


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, K: int, N: int, block_size: int) -> Tensor:
    """:func:`int8_linear` 的 4 位写法；形状见 :data:`~deepseek_export.ops.table.INT4_LINEAR`。"""
    return F.linear(x, dequantized(codes, scales, 4, K))


def dequantized(codes: Tensor, scales: Tensor, bits: int, width: int) -> Tensor:
    """码 → 权重。

    Args:
        codes: [..., ceil(width/block), block*bits/8] uint8，零点 2^(bits-1)，最后一块补满；4 位的两个一字节，低位在前。
        scales: [..., ceil(width/block)] float16。
        bits: 4 或 8。
        width: 输入维。

    Returns:
        [..., width] float32。
    """
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return ((codes.float() - (1 << (bits - 1))) * scales.float().unsqueeze(-1)).flatten(-2)[..., :width]


def fake(x, codes, scales, K, N, block_size):
    """形状推导（meta）。"""
    return x.new_empty(*x.shape[:-1], N)
