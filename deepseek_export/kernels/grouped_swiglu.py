"""``dsx::MoeExperts`` 与 ``dsx::QuantizedMoeExperts`` 的 Triton kernel：按专家分组的 SwiGLU。

契约（:data:`~deepseek_export.ops.table.MOE_EXPERTS`）：``x [N,D]``、``topk_ids``/``topk_weights [N,k]``、``w_gate``/``w_up [E,I,D]``、
``w_down [E,D,I]``，输出 ``y [N,D]``；累加都在 float32，每个专家的输出先舍入到 ``x`` 的 dtype 再加权，与参考实现一致。
``[0, E)`` 之外的专家编号不产生任何计算，也不贡献结果。

四步，全在设备上，不需要主机知道每个专家有几个 token：

1. ``sort_pairs``：(token, 槽位) 对按专家稳定地计数排序，给出每个专家的起点。
2. ``gate_up``：一个程序处理一个专家的 ``BLOCK_M`` 行。行块按专家编号依次排列，没有 token 的专家没有行块，权重也就不会被读。
3. ``down``：写到各对自己的行。
4. ``combine``：每个 token 按槽位次序加权相加，所以结果与排序无关、可复现，不用原子加。

权重是码时，第 2、3 步换成 :mod:`.quantized_swiglu` 的。
"""

import triton
import triton.language as tl


@triton.jit
def sort_pairs(topk_ids, sorted_pairs, offsets, pairs, E, BLOCK: tl.constexpr):
    """第 e 个程序把专家 e 的对写到 ``sorted_pairs[offsets[e]:]``；第 E 个程序只写总数 ``offsets[E]``。"""
    expert = tl.program_id(0)
    position = 0
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        ids = tl.load(topk_ids + pair, mask=pair < pairs, other=-1)
        position += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), 0)
    tl.store(offsets + expert, position)
    if expert == E:
        return
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mine = (tl.load(topk_ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        rank = tl.cumsum(mine, 0) - mine
        tl.store(sorted_pairs + position + rank, pair, mask=mine != 0)
        position += tl.sum(mine, 0)


@triton.jit
def expert_rows(tile, offsets, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """第 ``tile`` 个行块：(专家, 第一行, 该专家的末行)；没有这么多行块时专家 >= E。"""
    e = tl.arange(0, BLOCK_E)
    first = tl.load(offsets + e, mask=e < E, other=0)
    last = tl.load(offsets + e + 1, mask=e < E, other=0)
    tiles = tl.cdiv(last - first, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    row = tl.sum(tl.where(e == expert, first, 0), 0) + (tile - before) * BLOCK_M
    return expert, row, tl.sum(tl.where(e == expert, last, 0), 0)


@triton.jit
def tile_order(row_tiles, columns: tl.constexpr, GROUP: tl.constexpr):
    """一维程序号 → (行块, 列块)：每 ``GROUP`` 个行块一组，组内先走行，权重块留在 L2 里。"""
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    inside = pid % (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def expert_tile(
    offsets,
    row_tiles,
    columns: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """这个程序做哪一块：(专家, 各行, 各行是不是它的, 各列)；没有活时专家 >= E。"""
    tile, column = tile_order(row_tiles, columns, GROUP)
    expert, first, last = expert_rows(tile, offsets, E, BLOCK_E, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    return expert, rows, rows < last, column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def gate_up(
    x,
    w_gate,
    w_up,
    sorted_pairs,
    offsets,
    hidden,  # [N*k, I]，按排序后的次序
    top_k,
    row_tiles,
    D: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``hidden = silu(x w_gateᵀ) * (x w_upᵀ)``。"""
    expert, rows, live, n = expert_tile(
        offsets, row_tiles, tl.cdiv(INNER, BLOCK_N), E, BLOCK_E, BLOCK_M, BLOCK_N, GROUP
    )
    if expert >= E:
        return
    token = (tl.load(sorted_pairs + rows, mask=live, other=0) // top_k).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    w = (expert.to(tl.int64) * INNER + n)[:, None] * D + k[None, :]
    x_rows = x + token[:, None] * D + k[None, :]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = (start + k < D)[None, :]
        a = tl.load(x_rows + start, mask=live[:, None] & inside, other=0.0)
        g = tl.load(w_gate + w + start, mask=(n < INNER)[:, None] & inside, other=0.0)
        u = tl.load(w_up + w + start, mask=(n < INNER)[:, None] & inside, other=0.0)
        gate = tl.dot(a, tl.trans(g), acc=gate, out_dtype=tl.float32)
        up = tl.dot(a, tl.trans(u), acc=up, out_dtype=tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    out = hidden + rows.to(tl.int64)[:, None] * INNER + n[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & (n < INNER)[None, :])


@triton.jit
def down(
    hidden,
    w_down,
    sorted_pairs,
    offsets,
    expert_out,  # [N*k, D]，按 (token, 槽位) 的次序
    row_tiles,
    D: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``expert_out = hidden w_downᵀ``，尚未加权。"""
    expert, rows, live, n = expert_tile(
        offsets, row_tiles, tl.cdiv(D, BLOCK_N), E, BLOCK_E, BLOCK_M, BLOCK_N, GROUP
    )
    if expert >= E:
        return
    pair = tl.load(sorted_pairs + rows, mask=live, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    w = w_down + (expert.to(tl.int64) * D + n)[:, None] * INNER + k[None, :]
    hidden_rows = hidden + rows.to(tl.int64)[:, None] * INNER + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        inside = (start + k < INNER)[None, :]
        a = tl.load(hidden_rows + start, mask=live[:, None] & inside, other=0.0)
        b = tl.load(w + start, mask=(n < D)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc=acc, out_dtype=tl.float32)
    out = expert_out + pair[:, None] * D + n[None, :]
    tl.store(out, acc.to(expert_out.dtype.element_ty), mask=live[:, None] & (n < D)[None, :])


@triton.jit
def combine(
    expert_out, topk_ids, topk_weights, y, top_k, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``y[t] = sum_j topk_weights[t, j] * expert_out[t, j]``，按 j 的次序。"""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for j in range(top_k):
        pair = token * top_k + j
        expert = tl.load(topk_ids + pair)
        if (expert >= 0) & (expert < E):
            acc += tl.load(topk_weights + pair) * tl.load(
                expert_out + pair * D + d, mask=d < D, other=0.0
            ).to(tl.float32)
    tl.store(y + token * D + d, acc.to(y.dtype.element_ty), mask=d < D)
