"""int8 的 latent 缓存的一行：scale 的读与写；字节的布局见 :mod:`~deepseek_export.ops.int8_cache`，那里是参考实现。

写的一侧与参考实现逐位相同：除法用 IEEE 754 的舍入（``div_rn``，缺省的除法差一位），2 的幂由位拼出来，没有对数与幂。
"""

import triton
import triton.language as tl

#: 一行末尾一次读几个字节：两个 scale 六个，其余是补的零；整个一段是 128 位的拷贝。写的时候要写到行末，宽度不是 16 的倍数的至多 6 + 15 个。
TAIL, ENDING = tl.constexpr(16), tl.constexpr(32)
LEAST_EXPONENT, LARGEST_EXPONENT = tl.constexpr(-112), tl.constexpr(92)
#: 最小的 2 的幂，即最小的 scale。
LEAST_SCALE = tl.constexpr(2.0**-112)
#: 比可用的指数多，凑成 2 的幂。
EXPONENTS = tl.constexpr(256)
LATENT_CODES, ROPE_CODES = tl.constexpr(127.0), tl.constexpr(127.0 * 256)
#: 加上再减去它，float32 的小数就舍入到整数，一半取偶；绝对值不超过 2^22 的才行，码不超过 2^15。
ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def power_of_two(exponent):
    """``2^exponent``，float32；指数在规格化的数之内。"""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_at(tail, column, AT: tl.constexpr):
    """一行末尾的第 ``AT`` 个字节起的一个 scale：``(256 · 高 + 低) · 2^e``，各行一个。"""
    factor = tl.sum(tl.where(column == AT, tail * 256, tl.where(column == AT + 1, tail, 0)), 1)
    exponent = tl.sum(tl.where(column == AT + 2, tail, 0), 1)
    exponent = tl.minimum(tl.maximum(exponent, LEAST_EXPONENT), LARGEST_EXPONENT)
    return factor.to(tl.float32) * power_of_two(exponent)


@triton.jit
def row_scales(ends, LEFT: tl.constexpr):
    """latent 的、旋转部分的 scale。

    Args:
        ends: 各行 scale 的地址，[N, 1]。
        LEFT: 从那里到一行末尾有几个字节。
    """
    column = tl.arange(0, TAIL)[None, :]
    tail = tl.load(ends + column, mask=column < LEFT, other=0).to(tl.int32)
    return scale_at(tail, column, 0), scale_at(tail, column, 3)


@triton.jit
def row_codes(x, LARGEST: tl.constexpr):
    """一行 float32 → 码（int32）与 scale 的 ``k``、``e``；``k`` 是使码不超界的最小的一个，``e`` 是使 ``k <= 32512`` 的最小的一个。"""
    step = tl.div_rn(tl.max(tl.abs(x), 0), LARGEST)
    nth = tl.arange(0, EXPONENTS)
    inside = nth < LARGEST_EXPONENT - LEAST_EXPONENT
    bounds = ROPE_CODES * power_of_two(tl.where(inside, nth + LEAST_EXPONENT, 0))
    exponent = LEAST_EXPONENT + tl.sum((inside & (step > bounds)).to(tl.int32), 0)
    power = power_of_two(exponent)
    factor = tl.minimum(tl.maximum(tl.ceil(tl.div_rn(step, power)), 1.0), ROPE_CODES)
    codes = tl.minimum(tl.maximum(tl.div_rn(x, factor * power), -LARGEST), LARGEST)
    codes = (codes + ROUNDING) - ROUNDING
    return codes.to(tl.int32), factor.to(tl.int32), exponent


@triton.jit
def high_byte(code):
    """两个字节的码的高字节；低字节是 ``code - 256 * 高``，都在 int8 的范围里。"""
    return (code + 128) >> 8
