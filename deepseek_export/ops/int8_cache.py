"""int8 的 latent 缓存：每个 token 压成一行字节，舍入误差与 bfloat16 的缓存相当（``python -m perf run int8-cache``）。

``mla.cache_dtype=int8`` 时缓存仍是每层一个张量，只是一行里放的是（宽度即 :meth:`ModelConfig.latent_cache_width`）::

    | r 个          | dr 个            | dr 个            | scale 3 个         | scale 3 个           |
    | latent 的码 q | 旋转部分的高字节 | 旋转部分的低字节 | latent 的高, 低, e | 旋转部分的 高, 低, e |

latent 是 ``q · s``，q 在 [-127, 127]；旋转部分对误差敏感得多，留 16 位：``(256 · 高 + 低) · s_pe``，高在 [-127, 127]。两个 scale 都是
``k · 2^e``，``k = 256 · 高 + 低`` 在 1..32512，向上取整，码因此不会超界。k 也要 16 位：行内最大的那个数要几乎没有误差，只用 8 位时演示
检查点的误差大一成半。全零的行还原成零，任何字节都还原成有限的数。

TensorRT 的目标上一行末尾补零到 16 个字节的倍数（:func:`padded_rows`），前面的字节相同：V2、V3 是 656 个，每一段都从 16 的倍数起，kernel 用
128 位的拷贝。

两侧都只有精确的运算与 IEEE 754 的除法、乘法各一次舍入，没有对数与幂，所以各个实现写出的字节、还原的值逐位相同。

e 在 [-112, 92]：latent 的绝对值超过 127 · 32512 · 2^92（约 2e34）的饱和（含无穷），小于 2^-113 的得零。NaN 存不下，写进去的值不作约定。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: 每行末尾两个 scale 的字节数。
SCALE_BYTES = 6
#: 一个字节、两个字节的码的最大绝对值；scale 的 k 也是两个字节。
LATENT_CODES, ROPE_CODES = 127, 127 * 256
_LEAST_EXPONENT, _LARGEST_EXPONENT = -112, 92


def encode_rows(c_kv: Tensor, k_pe: Tensor) -> Tensor:
    """新 token 的 latent 与旋转部分 → 缓存里的行。

    Args:
        c_kv: [..., r] 浮点。
        k_pe: [..., dr] 浮点。

    Returns:
        [..., r+2*dr+6] int8。
    """
    latent, latent_scale = row_codes(c_kv.float(), LATENT_CODES)
    rope, rope_scale = row_codes(k_pe.float(), ROPE_CODES)
    return torch.cat([latent, *_bytes(rope), latent_scale, rope_scale], dim=-1).to(torch.int8)


def decode_rows(rows: Tensor, kv_lora_rank: int, dr: int | None = None) -> Tensor:
    """:func:`encode_rows` 的逆。

    Args:
        rows: [..., r+2*dr+6] int8，末尾可以补过零。
        kv_lora_rank: r。
        dr: 补过零的要给；缺省由宽度得出。

    Returns:
        [..., r+dr] float32。
    """
    if dr is None:
        dr = (rows.shape[-1] - SCALE_BYTES - kv_lora_rank) // 2
    elif rows.shape[-1] > (width := kv_lora_rank + 2 * dr + SCALE_BYTES):
        rows = rows[..., :width]
    latent, high, low, scales = rows.split([kv_lora_rank, dr, dr, SCALE_BYTES], dim=-1)
    factors = read_scale(scales)
    rope = high.float() * 256 + low.float()
    return torch.cat([latent.float() * factors[..., :1], rope * factors[..., 1:]], dim=-1)


def padded_rows(rows: Tensor, width: int) -> Tensor:
    """一行末尾补零到 ``width`` 个字节；已经那么宽的原样。"""
    missing = width - rows.shape[-1]
    return F.pad(rows, (0, missing)) if missing else rows


def read_scale(scales: Tensor) -> Tensor:
    """每个 scale 三个字节（高、低、e）→ 它的值：[..., 3n] int8 → [..., n] float32。"""
    factors = scales[..., 0::3].float() * 256 + scales[..., 1::3].float()
    return factors * _powers(scales.device)[scales[..., 2::3].long() + 128]


def row_codes(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """每行一个 scale 的码，与 scale 的三个字节；都仍是 float32。"""
    step = x.abs().amax(-1, keepdim=True) / largest
    # e 是使 k <= 32512 的最小的一个；数一数有几个 2 的幂不够大，不用对数，因此没有舍入。
    powers = _powers(x.device)
    bounds = ROPE_CODES * powers[_LEAST_EXPONENT + 128 : _LARGEST_EXPONENT + 128]
    index = (step > bounds).sum(-1, keepdim=True) + (_LEAST_EXPONENT + 128)
    power = powers[index]
    factor = torch.ceil(step / power).clamp(1, ROPE_CODES)
    codes = torch.round(x / (factor * power)).clamp(-largest, largest)
    return codes, torch.cat([*_bytes(factor), (index - 128).float()], dim=-1)


def _bytes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """两个字节的码 → 高、低，都在 int8 的范围里。"""
    high = torch.floor((codes + 128) / 256)
    return high, codes - 256 * high


def exponent_powers() -> list[float]:
    """下标 e+128 处是 2^e，e 限制在可用的范围里；字节因此可以直接当下标。"""
    return [2.0 ** min(max(e, _LEAST_EXPONENT), _LARGEST_EXPONENT) for e in range(-128, 128)]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor(exponent_powers(), device=device)
