"""int8 的 latent 缓存：每个 token 压成一行字节，舍入误差与 bfloat16 的缓存相当（``python -m perf.int8_cache``）。

``mla.cache_dtype=int8`` 时缓存仍是每层一个张量，只是一行里放的是（宽度即 :meth:`ModelConfig.latent_cache_width`）::

    | r 个          | dr 个          | dr 个          | 4 个                  |
    | latent 的码 q | 旋转部分的高字节 | 旋转部分的低字节 | k_c, e_c, k_pe, e_pe |

latent 是 ``q · s``，q 在 [-127, 127]；旋转部分对误差敏感得多，留 16 位：``(256 · 高 + 低) · s_pe``，高在 [-127, 127]。两个 scale 都是
``s = k · 2^e``，k 在 1..127：乘积至多 22 位有效位，float32 里没有舍入，所以各个实现还原出来的值逐位相同。k 向上取整，码因此不会超界；
最粗（k=64）时 scale 大 1/64。全零的行还原成零，任何字节都还原成有限的数。

e 在 [-100, 100]：绝对值超过 127² · 2^100 的饱和（含无穷），小于 2^-101 的得零。NaN 存不下，写进去的值不作约定。
"""

from __future__ import annotations

import torch
from torch import Tensor

#: 每行末尾 scale 的字节数。
SCALE_BYTES = 4
#: latent 与旋转部分的码的最大绝对值。
LATENT_CODES, ROPE_CODES = 127, 127 * 256
_LARGEST_FACTOR, _LEAST_EXPONENT, _LARGEST_EXPONENT = 127, -100, 100


def encode_rows(c_kv: Tensor, k_pe: Tensor) -> Tensor:
    """新 token 的 latent 与旋转部分 → 缓存里的行。

    Args:
        c_kv: [..., r] 浮点。
        k_pe: [..., dr] 浮点。

    Returns:
        [..., r+2*dr+4] int8。
    """
    latent, latent_scale = _codes(c_kv.float(), LATENT_CODES)
    rope, rope_scale = _codes(k_pe.float(), ROPE_CODES)
    high = torch.floor((rope + 128) / 256)
    return torch.cat([latent, high, rope - 256 * high, latent_scale, rope_scale], dim=-1).to(torch.int8)


def decode_rows(rows: Tensor, kv_lora_rank: int) -> Tensor:
    """:func:`encode_rows` 的逆。

    Args:
        rows: [..., r+2*dr+4] int8。
        kv_lora_rank: r。

    Returns:
        [..., r+dr] float32。
    """
    dr = (rows.shape[-1] - SCALE_BYTES - kv_lora_rank) // 2
    latent, high, low, scales = rows.split([kv_lora_rank, dr, dr, SCALE_BYTES], dim=-1)
    factors = scales[..., 0::2].float() * _powers(rows.device)[scales[..., 1::2].long() + 128]
    rope = high.float() * 256 + low.float()
    return torch.cat([latent.float() * factors[..., :1], rope * factors[..., 1:]], dim=-1)


def _codes(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """每行一个 scale 的码（仍是 float32），与 scale 的 (k, e)。"""
    step = x.abs().amax(-1, keepdim=True) / largest
    # e 是使 k <= 127 的最小的一个；数一数有几个 2 的幂不够大，不用对数，因此没有舍入。
    powers = _powers(x.device)
    bounds = _LARGEST_FACTOR * powers[_LEAST_EXPONENT + 128 : _LARGEST_EXPONENT + 128]
    index = (step > bounds).sum(-1, keepdim=True) + (_LEAST_EXPONENT + 128)
    power = powers[index]
    factor = torch.ceil(step / power).clamp(1, _LARGEST_FACTOR)
    codes = torch.round(x / (factor * power)).clamp(-largest, largest)
    return codes, torch.cat([factor, (index - 128).float()], dim=-1)


def _powers(device: torch.device) -> Tensor:
    """下标 e+128 处是 2^e，e 限制在可用的范围里；字节因此可以直接当下标。"""
    exponents = (min(max(e, _LEAST_EXPONENT), _LARGEST_EXPONENT) for e in range(-128, 128))
    return torch.tensor([2.0**e for e in exponents], device=device)
