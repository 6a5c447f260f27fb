"""``dsx::MoeExperts`` 与 ``dsx::QuantizedMoeExperts`` 的 Triton kernel：按专家分组的 SwiGLU。

契约（:data:`~deepseek_export.ops.table.MOE_EXPERTS`）：``x [N,D]``、``topk_ids``/``topk_weights [N,k]``、``w_gate``/``w_up [E,I,D]``、
``w_down [E,D,I]``，输出 ``y [N,D]``；累加都在 float32，每个专家的输出先舍入到 ``x`` 的 dtype 再加权，与参考实现一致。
``[0, E)`` 之外的专家编号不产生任何计算，也不贡献结果。

四步，全在设备上，不需要主机知道每个专家有几个 token：

1. ``sort_pairs``：(token, 槽位) 对按专家稳定地计数排序，给出每个专家的起点；至多 ``FEW`` 对时不启动，后两步的每个程序自己看一遍各对的专家（:func:`few_rows`）。
2. ``gate_up``：一个程序处理一个专家的 ``BLOCK_M`` 行。没有 token 的专家没有行块，权重也就不会被读。
3. ``down``：读写都在各对自己的行。
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
def few_rows(tile, topk_ids, pairs, E: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr):
    """同 :func:`tile_rows`，至多 ``FEW`` 对，不排序：一对是同一专家里的第几个，与前面的各对比一遍就知道；第 0、``BLOCK_M``……个各开一个行块。"""
    pair = tl.arange(0, FEW)
    ids = tl.load(topk_ids + pair, mask=pair < pairs, other=-1)
    earlier = (ids[None, :] == ids[:, None]) & (pair[None, :] < pair[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    opens = (ids >= 0) & (ids < E) & (rank % BLOCK_M == 0)
    mine = opens & (tl.cumsum(opens.to(tl.int32), 0) == tile + 1)
    first = tl.sum(tl.where(mine, rank, 0), 0)
    expert = tl.where(tl.sum(mine.to(tl.int32), 0) > 0, tl.sum(tl.where(mine, ids, 0), 0), E)
    row = first + tl.arange(0, BLOCK_M)
    here = (ids[None, :] == expert) & (rank[None, :] == row[:, None])
    return expert, tl.sum(tl.where(here, pair[None, :], 0), 1), tl.sum(here.to(tl.int32), 1) > 0


@triton.jit
def tile_rows(
    tile,
    topk_ids,
    sorted_pairs,
    offsets,
    pairs,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FEW: tl.constexpr,
):
    """第 ``tile`` 个行块：(专家, 各行是第几对, 有没有这一行)；没有这么多行块时专家 >= E。"""
    if pairs <= FEW:
        expert, pair, live = few_rows(tile, topk_ids, pairs, E, BLOCK_M, FEW)
    else:
        expert, first, last = expert_rows(tile, offsets, E, BLOCK_E, BLOCK_M)
        rows = first + tl.arange(0, BLOCK_M)
        live = rows < last
        pair = tl.load(sorted_pairs + rows, mask=live, other=0)
    return expert, pair.to(tl.int64), live


@triton.jit
def tile_order(row_tiles, columns: tl.constexpr, GROUP: tl.constexpr):
    """一维程序号 → (行块, 列块)：每 ``GROUP`` 个行块一组，组内先走行，权重块留在 L2 里。"""
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    inside = pid % (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def gate_up(
    x,
    w_gate,
    w_up,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``hidden = silu(x w_gateᵀ) * (x w_upᵀ)``。"""
    tile, column = tile_order(row_tiles, tl.cdiv(INNER, BLOCK_N), GROUP)
    expert, pair, live = tile_rows(tile, topk_ids, sorted_pairs, offsets, pairs, E, BLOCK_E, BLOCK_M, FEW)
    if expert >= E:
        return
    token = pair // TOP_K
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
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
    out = hidden + pair[:, None] * INNER + n[None, :]
    tl.store(out, value.to(hidden.dtype.element_ty), mask=live[:, None] & (n < INNER)[None, :])


@triton.jit
def down(
    hidden,
    w_down,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``expert_out = hidden w_downᵀ``，尚未加权。"""
    tile, column = tile_order(row_tiles, tl.cdiv(D, BLOCK_N), GROUP)
    expert, pair, live = tile_rows(tile, topk_ids, sorted_pairs, offsets, pairs, E, BLOCK_E, BLOCK_M, FEW)
    if expert >= E:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    w = w_down + (expert.to(tl.int64) * D + n)[:, None] * INNER + k[None, :]
    hidden_rows = hidden + pair[:, None] * INNER + k[None, :]
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
    expert_out,
    topk_ids,
    topk_weights,
    y,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``y[t] = sum_j topk_weights[t, j] * expert_out[t, j]``，按 j 的次序。"""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        expert = tl.load(topk_ids + pair)
        if (expert >= 0) & (expert < E):
            acc += tl.load(topk_weights + pair) * tl.load(
                expert_out + pair * D + d, mask=d < D, other=0.0
            ).to(tl.float32)
    tl.store(y + token * D + d, acc.to(y.dtype.element_ty), mask=d < D)
