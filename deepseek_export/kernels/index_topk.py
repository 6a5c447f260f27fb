"""``dsx::IndexTopK`` 的 Triton kernel：给看得见的 key 打分，再挑出分数最大的 ``TOPK`` 个。

契约（:data:`~deepseek_export.ops.table.INDEX_TOPK`）：分数是 ``Σ_h w_h · relu(q_h · k)``，float32；``index_cache [B,1,T,D]`` 已写入本次的 S 行；
第 i 个 query 看得见 ``j <= past_lens[b] + i``，超出 T 的部分不读；并列取小的位置；``indices`` 升序，前 ``counts`` 个之后是 -1。
看得见的不超过 ``TOPK`` 个的 query 不打分。

挑选是基数选择：把分数换成同序的 uint32，从高到低每次一个字节数直方图，四遍之后得到第 ``TOPK`` 名的值与还差几个并列的；再走一遍，按位置从小到大
写出，所以不用排序，并列与升序都自然成立。直方图是整数，结果可复现。

两种走法，由启动表按 query 的个数选：少时（解码）``index_topk_scores`` 把一个 query 的 key 分成几段、``index_topk_select`` 一个程序挑一个
query，分数 [B*S, T] 在 workspace 里；多时（prefill）``index_topk_rows`` 一个程序从打分到挑选做完一个 query 再做下一个，workspace 只有每个程序一行分数，
与 query 的个数无关。
"""

import triton
import triton.language as tl

from deepseek_export.kernels.latent_attention import split_length


@triton.jit
def visible_keys(past_lens, query, S, T):
    """第 ``query`` 个（b*S + i）看得见几个 key，限制在 [0, T]。"""
    past = tl.load(past_lens + query // S).to(tl.int32)
    return tl.minimum(tl.maximum(past + query % S + 1, 0), T)


@triton.jit
def score_keys(
    q,
    w,
    index_cache,
    scores,  # 这个 query 的一行，[T] float32
    query,
    S,
    H,
    T,
    start,
    end,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """第 ``start .. end-1`` 个 key 的分数；``BLOCK_M`` 是全部索引头。"""
    h, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = query.to(tl.int64) * H + h
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=(h < H)[:, None] & (d < D)[None, :], other=0.0)
    weights = tl.load(w + row, mask=h < H, other=0.0)
    first = (query // S).to(tl.int64) * T
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        stored = key < end  # 之后的行可能是 NaN：不读
        keys = tl.load(
            index_cache + (first + key)[:, None] * D + d[None, :],
            mask=stored[:, None] & (d < D)[None, :],
            other=0.0,
        ).to(queries.dtype)
        products = tl.dot(keys, tl.trans(queries), out_dtype=tl.float32)
        total = tl.sum(tl.maximum(products, 0.0) * weights[None, :], 1)
        # 负权重乘零是 -0.0，与 0.0 并列，位却不同。
        tl.store(scores + key, tl.where(total == 0.0, 0.0, total), mask=stored)


@triton.jit
def ordered_bits(scores):
    """float32 → 同序的 uint32。"""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def select_keys(scores, indices, visible, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """由一行分数挑出 ``TOPK`` 个位置写进 ``indices``；``visible`` 大于 ``TOPK``。"""
    bins = tl.arange(0, 256)
    edge = tl.full([], 0, tl.uint32)  # 第 TOPK 名的高几个字节
    left = tl.full([], TOPK, tl.int32)  # 高几个字节与它相同的里面还要几个
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int32)
        for n in range(0, visible, BLOCK):
            place = n + tl.arange(0, BLOCK)
            bits = ordered_bits(tl.load(scores + place, mask=place < visible, other=0.0))
            same = place < visible
            if digit > 0:
                same = same & ((bits >> (shift + 8)) == (edge >> (shift + 8)))
            byte = ((bits >> shift) & 0xFF).to(tl.int32)
            histogram += tl.histogram(byte, 256, mask=same)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        here = (above < left) & (above + histogram >= left)
        edge = edge | (tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32) << shift)
        left = left - tl.sum(tl.where(here, above, 0), 0)

    taken = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for n in range(0, visible, BLOCK):
        place = n + tl.arange(0, BLOCK)
        live = place < visible
        bits = ordered_bits(tl.load(scores + place, mask=live, other=0.0))
        tie = (live & (bits == edge)).to(tl.int32)
        rank = ties + tl.cumsum(tie, 0) - tie
        take = live & ((bits > edge) | ((tie > 0) & (rank < left)))
        chosen = take.to(tl.int32)
        tl.store(indices + taken + tl.cumsum(chosen, 0) - chosen, place, mask=take)
        taken += tl.sum(chosen, 0)
        ties += tl.sum(tie, 0)


@triton.jit
def take_every_key(indices, visible, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """看得见的不超过 ``TOPK`` 个：全部选中，其余 -1。"""
    for n in range(0, TOPK, BLOCK):
        place = n + tl.arange(0, BLOCK)
        tl.store(indices + place, tl.where(place < visible, place, -1), mask=place < TOPK)


@triton.jit
def index_topk_scores(
    q,  # [B, S, H, D]
    w,  # [B, S, H] float32
    index_cache,  # [B, 1, T, D]
    past_lens,  # [B] int64
    scores,  # [B*S, T] float32
    S,
    H,
    T,
    num_splits,
    TOPK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    query, split = tl.program_id(0), tl.program_id(1)
    visible = visible_keys(past_lens, query, S, T)
    length = split_length(visible, num_splits, BLOCK_N)
    start = split * length
    end = tl.minimum(start + length, visible)
    if (visible <= TOPK) | (start >= end):
        return
    line = scores + query.to(tl.int64) * T
    score_keys(q, w, index_cache, line, query, S, H, T, start, end, D, BLOCK_D, BLOCK_M, BLOCK_N)


@triton.jit
def index_topk_select(
    past_lens,
    scores,
    indices,  # [B, S, TOPK] int32
    counts,  # [B, S] int32
    S,
    T,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = tl.program_id(0)
    visible = visible_keys(past_lens, query, S, T)
    tl.store(counts + query, tl.minimum(visible, TOPK))
    chosen = indices + query.to(tl.int64) * TOPK
    if visible <= TOPK:
        take_every_key(chosen, visible, TOPK, BLOCK)
    else:
        select_keys(scores + query.to(tl.int64) * T, chosen, visible, TOPK, BLOCK)


@triton.jit
def index_topk_rows(
    q,
    w,
    index_cache,
    past_lens,
    indices,
    counts,
    scores,  # [程序的个数, T] float32
    queries,
    S,
    H,
    T,
    TOPK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """参数同上面两个；``queries`` 是 B*S。"""
    line = scores + tl.program_id(0).to(tl.int64) * T
    query = tl.program_id(0)
    while query < queries:
        visible = visible_keys(past_lens, query, S, T)
        tl.store(counts + query, tl.minimum(visible, TOPK))
        chosen = indices + query.to(tl.int64) * TOPK
        if visible <= TOPK:
            take_every_key(chosen, visible, TOPK, BLOCK)
        else:
            score_keys(q, w, index_cache, line, query, S, H, T, 0, visible, D, BLOCK_D, BLOCK_M, BLOCK_N)
            tl.debug_barrier()  # 分数由别的线程写下
            select_keys(line, chosen, visible, TOPK, BLOCK)
            tl.debug_barrier()  # 都读完了才能写下一个 query 的
        query += tl.num_programs(0)
