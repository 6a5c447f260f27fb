"""``dsx::LatentCacheUpdate`` 的 Triton kernel：量化一个新 token 的 latent 与旋转部分，写成缓存里的一行。

契约（:data:`~deepseek_export.ops.table.LATENT_CACHE_UPDATE`）：第 b 条的第 i 个 token 写在第 ``past_lens[b] + i`` 行；不在 [0, T) 的不写。字节与参考实现
:mod:`~deepseek_export.ops.int8_cache` 逐位相同。一个程序一行；一行不过几百个字节，活只在启动。
"""

import triton
import triton.language as tl

from deepseek_export.kernels.int8_rows import ENDING, LATENT_CODES, ROPE_CODES, high_byte, row_codes


@triton.jit
def latent_cache_update(
    c_kv,  # [B, S, R]
    k_pe,  # [B, S, P]
    past_lens,  # [B] int64
    kv_cache_out,  # [B, 1, T, WIDTH] int8，与输入的缓存是同一块
    S,
    T,
    R: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b = token // S
    at = tl.load(past_lens + b) + token % S
    if (at < 0) | (at >= T):
        return
    r, p, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P), tl.arange(0, ENDING)
    latent = tl.load(c_kv + token * R + r, mask=r < R, other=0.0).to(tl.float32)
    rope = tl.load(k_pe + token * P + p, mask=p < P, other=0.0).to(tl.float32)
    latent, latent_factor, latent_exponent = row_codes(latent, LATENT_CODES)
    rope, rope_factor, rope_exponent = row_codes(rope, ROPE_CODES)

    tail = tl.where(column == 0, high_byte(latent_factor), 0)
    tail = tl.where(column == 1, latent_factor - 256 * high_byte(latent_factor), tail)
    tail = tl.where(column == 2, latent_exponent, tail)
    tail = tl.where(column == 3, high_byte(rope_factor), tail)
    tail = tl.where(column == 4, rope_factor - 256 * high_byte(rope_factor), tail)
    tail = tl.where(column == 5, rope_exponent, tail)

    row = kv_cache_out + (b * T + at) * WIDTH
    tl.store(row + r, latent.to(tl.int8), mask=r < R)
    tl.store(row + R + p, high_byte(rope).to(tl.int8), mask=p < P)
    tl.store(row + R + P + p, (rope - 256 * high_byte(rope)).to(tl.int8), mask=p < P)
    tl.store(row + R + 2 * P + column, tail.to(tl.int8), mask=column < WIDTH - R - 2 * P)
