"""int8 的索引 key：一个 token 一行字节，``di`` 个码、一个 scale（三个字节，写法同 ``ops/int8_cache.py``）。

``dsa.index_cache_dtype=int8`` 时缓存是 [B, 1, T, di+3]::

    | di 个   | 3 个           |
    | 码 k    | scale 的高, 低, e |

打分时 query 也逐头舍入到 int8，所以一个点积是整数、没有误差：``(Σ q·k) · s_q · s_k``。``s_q`` 是正的，并进这个头的权重；``s_k`` 也是正的，
最后乘。于是分数只在各头相加时有浮点的舍入，与各实现的求和次序有关。

舍入之前 query 与 key 各乘同一个正交的 Hadamard 矩阵（厂商的推理代码也这样做）：点积不变，而突出的几个通道摊平了，一个 scale 才够用。
它在图里是索引器模块的一次矩阵乘，不在算子里：算子拿到的就是变换过的。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.int8_cache import LATENT_CODES, read_scale, row_codes

#: 每行末尾 scale 的字节数。
SCALE_BYTES = 3


def hadamard(width: int) -> Tensor:
    """[width, width] 的正交矩阵，float32：``width`` 里最大的 2 的幂那么大的 Hadamard 块沿对角线排开；128 就是整个一块。"""
    size = width & -width
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block * size**-0.5] * (width // size))


def encode_keys(k: Tensor) -> Tensor:
    """[..., di] 浮点 → 缓存里的行 [..., di+3] int8。"""
    codes, scale = row_codes(k.float(), LATENT_CODES)
    return torch.cat([codes, scale], dim=-1).to(torch.int8)


def decode_keys(rows: Tensor) -> Tensor:
    """:func:`encode_keys` 的逆：[..., di+3] int8 → [..., di] float32。"""
    codes, scale = split_keys(rows)
    return codes * scale


def split_keys(rows: Tensor) -> tuple[Tensor, Tensor]:
    """码 [..., di] 与 scale [..., 1]，都是 float32。"""
    codes, scale = rows.split([rows.shape[-1] - SCALE_BYTES, SCALE_BYTES], dim=-1)
    return codes.float(), read_scale(scale)


def encode_query(q: Tensor) -> tuple[Tensor, Tensor]:
    """[..., di] 浮点 → 码 [..., di] 与 scale [...]，都是 float32。"""
    codes, scale = row_codes(q.float(), LATENT_CODES)
    return codes, read_scale(scale).squeeze(-1)
