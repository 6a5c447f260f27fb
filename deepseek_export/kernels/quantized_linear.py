"""``dsx::QuantizedLinear`` 的 kernel：``y = x wᵀ``，权重是码，怎么读见 :mod:`.widened`。

行少时受限于读权重，一个程序一列块不够分给全部 SM：K 切成 ``SPLITS`` 段，各段的部分和以 float32 写进 workspace，再由 ``sum_splits`` 按段的次序相加，
结果可复现，不用原子加。只有一段时直接写 ``y``。
"""

import triton
import triton.language as tl

from deepseek_export.kernels.grouped_swiglu import tile_order
from deepseek_export.kernels.widened import add_product


@triton.jit
def quantized_linear(
    x,  # [rows, K]
    w,
    w_scales,
    y,  # [SPLITS, rows, N]
    rows,
    row_tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """一块行、一块列、一段 K。"""
    STEPS: tl.constexpr = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    tile, column = tile_order(row_tiles, tl.cdiv(N, BLOCK_N), GROUP)
    split = tl.program_id(1)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (m < rows)[:, None]
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = (n < N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    x_rows = x + m.to(tl.int64)[:, None] * K + k
    codes = w + n.to(tl.int64)[:, None] * (K * BITS // 8)
    scales = w_scales + (n // TALL).to(tl.int64)[:, None] * tl.cdiv(K, SCALED)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(split * STEPS, (split + 1) * STEPS):
        start = step * BLOCK_K
        a = tl.trans(tl.load(x_rows + start, mask=live & (start + k < K), other=0.0))
        acc = add_product(acc, codes, scales, a, step, wide, K, BITS, E4M3, SCALED, BLOCK_N, BLOCK_K)
    out = y + (split.to(tl.int64) * rows + m)[:, None] * N + n[None, :]
    tl.store(out, tl.trans(acc).to(y.dtype.element_ty), mask=live & (n < N)[None, :])


@triton.jit
def sum_splits(
    partial,  # [SPLITS, total] float32
    y,  # [total]
    total,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """各段按次序相加。"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(0, SPLITS):
        acc += tl.load(partial + split * total.to(tl.int64) + i, mask=i < total, other=0.0)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=i < total)
