"""``dsx::QuantizedMoeExperts`` 的两次矩阵乘：权重是码；排序与加权同 :mod:`.grouped_swiglu`，码怎么读见 :mod:`.widened`。"""

import triton
import triton.language as tl

from deepseek_export.kernels.grouped_swiglu import tile_order, tile_rows
from deepseek_export.kernels.widened import add_product


@triton.jit
def code_rows(
    expert,
    n,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    TALL: tl.constexpr,
):
    """一个专家的权重 [N, K] 的第 ``n`` 行：码与 scale 各从哪里起，``[行, 1]``。"""
    e = expert.to(tl.int64)
    codes = (e * N + n)[:, None] * (K * BITS // 8)
    return codes, (e * tl.cdiv(N, TALL) + n // TALL)[:, None] * tl.cdiv(K, SCALED)


@triton.jit
def quantized_gate_up(
    x,
    w_gate,
    w_gate_scales,
    w_up,
    w_up_scales,
    topk_ids,
    sorted_pairs,
    offsets,
    hidden,  # [N*k, I]，按 (token, 槽位) 的次序
    pairs,
    row_tiles,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``hidden = silu(x w_gateᵀ) * (x w_upᵀ)``。"""
    tile, column = tile_order(row_tiles, tl.cdiv(INNER, BLOCK_N), GROUP)
    expert, pair, live = tile_rows(tile, topk_ids, sorted_pairs, offsets, pairs, E, BLOCK_E, BLOCK_M, FEW)
    if expert >= E:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    token = pair // TOP_K
    k = tl.arange(0, BLOCK_K)
    code, scale = code_rows(expert, n, INNER, D, BITS, SCALED, TALL)
    inner = (n < INNER)[:, None]
    x_rows = x + token[:, None] * D + k[None, :]
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_K)):
        start = step * BLOCK_K
        a = tl.trans(tl.load(x_rows + start, mask=live[:, None] & (start + k < D)[None, :], other=0.0))
        gate = add_product(
            gate,
            w_gate + code,
            w_gate_scales + scale,
            a,
            step,
            inner,
            D,
            BITS,
            E4M3,
            SCALED,
            BLOCK_N,
            BLOCK_K,
        )
        up = add_product(
            up, w_up + code, w_up_scales + scale, a, step, inner, D, BITS, E4M3, SCALED, BLOCK_N, BLOCK_K
        )
    value = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
    out = hidden + pair[:, None] * INNER + n[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & (n < INNER)[None, :])


@triton.jit
def quantized_down(
    hidden,
    w_down,
    w_down_scales,
    topk_ids,
    sorted_pairs,
    offsets,
    expert_out,  # [N*k, D]，同 hidden 的次序
    pairs,
    row_tiles,
    D: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``expert_out = hidden w_downᵀ``，尚未加权。"""
    tile, column = tile_order(row_tiles, tl.cdiv(D, BLOCK_N), GROUP)
    expert, pair, live = tile_rows(tile, topk_ids, sorted_pairs, offsets, pairs, E, BLOCK_E, BLOCK_M, FEW)
    if expert >= E:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    code, scale = code_rows(expert, n, D, INNER, BITS, SCALED, TALL)
    codes, scales, wide = w_down + code, w_down_scales + scale, (n < D)[:, None]
    hidden_rows = hidden + pair[:, None] * INNER + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(0, tl.cdiv(INNER, BLOCK_K)):
        start = step * BLOCK_K
        a = tl.trans(
            tl.load(hidden_rows + start, mask=live[:, None] & (start + k < INNER)[None, :], other=0.0)
        )
        acc = add_product(acc, codes, scales, a, step, wide, INNER, BITS, E4M3, SCALED, BLOCK_N, BLOCK_K)
    out = expert_out + pair[:, None] * D + n[None, :]
    tl.store(out, tl.trans(acc).to(expert_out.dtype.element_ty), mask=live[:, None] & (n < D)[None, :])
