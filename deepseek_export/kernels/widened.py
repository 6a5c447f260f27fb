"""权重是码的矩阵乘的一段：从显存读的是码与 scale，在寄存器里还原，乘进累加器。专家与线性层共用。

权重 [N, K]，沿 K 每 ``SCALED`` 列、沿 N 每 ``TALL`` 行一个 scale。三种码：

- int8、int4（一字节两个，低位在前）：码乘 scale 舍入到 scale 的 dtype，与参考实现逐位相同；
- e4m3（FP8 分块的检查点，scale 是 float32）：码放进 16 位浮点是准的，所以不还原，scale 乘在这一段的积上；比参考实现少舍入一次。

积是转置的：权重在左边，还原之后留在寄存器里，不必写回共享内存（Hopper 的右操作数只能在那里）。
"""

import triton
import triton.language as tl

#: e4m3 的指数与尾数移几位就到 16 位浮点的位置，再乘上两种偏置之差。
BFLOAT16_SHIFT, BFLOAT16_FACTOR = tl.constexpr(4), tl.constexpr(2.0 ** (127 - 7))
FLOAT16_SHIFT, FLOAT16_FACTOR = tl.constexpr(7), tl.constexpr(2.0 ** (15 - 7))


@triton.jit
def moved(bits, SHIFT: tl.constexpr):
    """e4m3 的字节（int8）→ 16 位浮点的位（int16），还差一个 2 的幂。"""
    wide = bits.to(tl.int16)  # 符号扩展，最高位就是符号
    return (wide & -32768) | ((wide & 0x7F) << SHIFT)


@triton.jit
def e4m3(bits, dtype: tl.constexpr):
    """e4m3 的字节 → ``dtype`` 的数，没有误差，次正规数也是。用整数指令，sm80、sm86 没有 e4m3 的转换指令也编译得出来。"""
    if dtype == tl.bfloat16:
        values = moved(bits, BFLOAT16_SHIFT).to(tl.bfloat16, bitcast=True) * BFLOAT16_FACTOR
    else:
        values = (moved(bits, FLOAT16_SHIFT).to(tl.float16, bitcast=True) * FLOAT16_FACTOR).to(dtype)
    return values


@triton.jit
def widened(codes, scales, BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """整数的码 [ROWS, WIDTH*BITS/8] 与 scale [ROWS, GROUPS] → 权重 [ROWS, WIDTH]，dtype 同 scale。

    码放进 scale 的 dtype 是准的，所以乘积只舍入一次。
    """
    if BITS == 4:
        # 一字节两个有符号的码，低位在前。
        codes = tl.join((codes << 4) >> 4, codes >> 4).reshape(ROWS, WIDTH)
    values = codes.to(scales.dtype)
    return (values.reshape(ROWS, GROUPS, WIDTH // GROUPS) * scales[:, :, None]).reshape(ROWS, WIDTH)


@triton.jit
def add_product(
    acc,  # [ROWS, M] float32
    codes,  # 各行的起点 [ROWS, 1]
    scales,
    a,  # [WIDTH, M]
    step,
    live,  # [ROWS, 1]
    DEPTH: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``acc + w[:, step * WIDTH : (step + 1) * WIDTH] a``；``DEPTH`` 是权重一行的列数。"""
    BYTES: tl.constexpr = WIDTH * BITS // 8
    GROUPS: tl.constexpr = WIDTH // SCALED if WIDTH > SCALED else 1
    k = step * BYTES + tl.arange(0, BYTES)[None, :]
    if WIDTH < SCALED:
        group = step // (SCALED // WIDTH) + tl.arange(0, 1)[None, :]
    else:
        group = step * GROUPS + tl.arange(0, GROUPS)[None, :]
    code = tl.load(codes + k, mask=live & (k < DEPTH * BITS // 8), other=0)
    scale = tl.load(scales + group, mask=live & (group < tl.cdiv(DEPTH, SCALED)), other=0.0)
    if E4M3:
        acc += tl.dot(e4m3(code, a.dtype), a, out_dtype=tl.float32) * scale
    else:
        w = widened(code, scale, BITS, ROWS, WIDTH, GROUPS)
        acc = tl.dot(w, a, acc=acc, out_dtype=tl.float32)
    return acc
