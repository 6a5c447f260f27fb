"""权重是码的算子共用：码与 scale → 权重。"""

from __future__ import annotations

import torch
from torch import Tensor


def widened(
    codes: Tensor, scales: Tensor, block_size: int, block_rows: int, e4m3: int, dtype: torch.dtype
) -> Tensor:
    """码 → 权重。

    Args:
        codes: [..., N, K] int8；int4 的码也各占一字节。
        scales: [..., ceil(N/block_rows), ceil(K/block_size)]。
        block_size, block_rows: 一个 scale 管几列、几行。
        e4m3: 码的每个字节是不是一个 e4m3。
        dtype: 结果的 dtype；整数的码乘 scale 在 float32 里没有误差，e4m3 的在 float32 里舍入一次，最后再舍入一次。
    """
    values = codes.view(torch.float8_e4m3fn) if e4m3 else codes
    rows, columns = codes.shape[-2:]
    each = scales.float().repeat_interleave(block_rows, -2).repeat_interleave(block_size, -1)
    return (values.float() * each[..., :rows, :columns]).to(dtype)
