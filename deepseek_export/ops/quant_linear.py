"""``dsx::Int8Linear``、``dsx::Int4Linear``、``dsx::Int4AffineLinear``：权重是逐块的码的线性层；参考实现先还原权重，激活不量化。"""

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


def int4_affine_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor, K: int, N: int, block_size: int
) -> Tensor:
    """零点逐块给出的 :func:`int4_linear`；形状见 :data:`~deepseek_export.ops.table.INT4_AFFINE_LINEAR`。"""
    return F.linear(x, dequantized(codes, scales, 4, K, zero_points))


def dequantized(
    codes: Tensor, scales: Tensor, bits: int, width: int, zero_points: Tensor | None = None
) -> Tensor:
    """码 → 权重。

    Args:
        codes: [..., ceil(width/block), block*bits/8] uint8，零点 2^(bits-1)，最后一块补满；4 位的两个一字节，低位在前。
        scales: [..., ceil(width/block)] float16。
        bits: 4 或 8。
        width: 输入维。
        zero_points: [..., ceil(width/block/2)] uint8，每块一个 4 位的零点，低位在前；没有就是上面那个。

    Returns:
        [..., width] float32。
    """
    if bits == 4:
        codes = _nibbles(codes)
    zeros: Tensor | int = 1 << (bits - 1)
    if zero_points is not None:
        zeros = _nibbles(zero_points)[..., : scales.shape[-1], None].float()
    return ((codes.float() - zeros) * scales.float().unsqueeze(-1)).flatten(-2)[..., :width]


def _nibbles(packed: Tensor) -> Tensor:
    """最后一维一字节两个 4 位数，低位在前。"""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def fake(x, codes, scales, K, N, block_size):
    """形状推导（meta）。"""
    return x.new_empty(*x.shape[:-1], N)


def fake_affine(x, codes, scales, zero_points, K, N, block_size):
    """形状推导（meta）。"""
    return x.new_empty(*x.shape[:-1], N)
