"""``dsx::SparseLatentAttention`` 的 Triton kernel：一个 query 只读选中的行；分段 partial 一遍、reduce 一遍，累加都在 float32。

契约（:data:`~deepseek_export.ops.table.SPARSE_LATENT_ATTENTION`）：``q [B,S,H,R+P]`` 已吸收 W_UK；``indices [B,S,TOPK]`` 的前 ``counts[b,i]`` 个是选中的
行号，之后的不读。一行 latent 既是 K（全部列）又是 V（前 R 列），只从显存读一遍。一行都没有选中的 query 得到零，不是 NaN。

同一个 query 的各头共用选中的行，不同的 query 各选各的，所以一个程序处理一个 query 的 ``BLOCK_M`` 个头与一段选中的行。行在显存里不连续，一行
至少几百字节，仍是 128 位的拷贝；下一组的行号提前一次迭代读好，行的拷贝不等它。
"""

import triton
import triton.language as tl

from deepseek_export.kernels.latent_attention import split_length


@triton.jit
def sparse_latent_attention_partial(
    q,  # [B, S, H, R+P]
    kv_cache,  # [B, 1, T, R+P]
    indices,  # [B, S, TOPK] int32
    counts,  # [B, S] int32
    context,  # [H, B*S, R]，只用到一段的 query 直接写这里
    partial,  # [B*S, num_splits, H, R] float32，各段已归一化的结果
    lse,  # [B*S, num_splits, H] float32，各段的 log2(sum(2^score))
    scale,
    S,
    H,
    T,
    num_splits,
    TOPK: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head_blocks = tl.cdiv(H, BLOCK_M)
    query, split = (tl.program_id(0) // head_blocks).to(tl.int64), tl.program_id(1)
    chosen = tl.minimum(tl.maximum(tl.load(counts + query), 0), TOPK)
    length = split_length(chosen, num_splits, BLOCK_N)
    start = split * length
    end = tl.minimum(start + length, chosen)
    if (split > 0) & (start >= end):
        return

    head = tl.program_id(0) % head_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    live, in_r, in_p = (head < H)[:, None], (r < R)[None, :], (p < P)[None, :]
    q_rows = q + (query * H + head)[:, None] * (R + P)
    q_latent = tl.load(q_rows + r[None, :], mask=live & in_r, other=0.0)
    q_pe = tl.load(q_rows + R + p[None, :], mask=live & in_p, other=0.0)
    cache = kv_cache + query // S * T * (R + P)  # 之后的偏移在一段缓存之内，int32 够用：地址少占一半寄存器
    places = indices + query * TOPK

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    place = start + tl.arange(0, BLOCK_N)
    # 一段的末尾凑不满一块：多出来的格子再读一遍这一段的第一行，权重是 0；读选中的行，就不会读到没有写过的 NaN。
    spare = tl.load(places + start, mask=start < end, other=0)
    key = tl.load(places + place, mask=place < end, other=spare)
    for n in range(start, end, BLOCK_N):
        stored = n + tl.arange(0, BLOCK_N) < end
        kv_rows = cache + key[:, None] * (R + P)
        place = n + BLOCK_N + tl.arange(0, BLOCK_N)
        key = tl.load(places + place, mask=place < end, other=spare)
        latent = tl.load(kv_rows + r[None, :], mask=in_r, other=0.0).to(q_latent.dtype)
        k_pe = tl.load(kv_rows + R + p[None, :], mask=in_p, other=0.0).to(q_latent.dtype)
        scores = tl.dot(q_latent, tl.trans(latent), out_dtype=tl.float32)
        scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
        scores = tl.where(
            stored[None, :], scores * (scale * 1.4426950408889634), float("-inf")
        )  # 之后用 exp2
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc=acc * decay[:, None], out_dtype=tl.float32)
        top = new_top

    divisor = tl.where(total > 0.0, total, 1.0)
    acc = acc / divisor[:, None]
    if length >= chosen:
        queries = tl.num_programs(0) // head_blocks
        out = context + (head.to(tl.int64) * queries + query)[:, None] * R + r[None, :]
        tl.store(out, acc.to(context.dtype.element_ty), mask=live & in_r)
    else:
        slots = (query * num_splits + split) * H + head
        tl.store(partial + slots[:, None] * R + r[None, :], acc, mask=live & in_r)
        tl.store(lse + slots, top + tl.log2(divisor), mask=head < H)


@triton.jit
def sparse_latent_attention_reduce(
    counts,
    context,
    partial,
    lse,
    H,
    num_splits,
    TOPK: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """把一个头的各段按 ``2^lse`` 加权平均；参数同 :func:`sparse_latent_attention_partial`，``BLOCK_S`` 不小于段数。"""
    row = tl.program_id(0)
    query = (row // H).to(tl.int64)
    chosen = tl.minimum(tl.maximum(tl.load(counts + query), 0), TOPK)
    length = split_length(chosen, num_splits, BLOCK_N)
    if length >= chosen:
        return
    split = tl.arange(0, BLOCK_S)
    stored = split < tl.cdiv(chosen, length)  # 之后的格子没有写过
    slots = (query * num_splits + split) * H + row % H
    scores = tl.load(lse + slots, mask=stored, other=float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 0))
    weights = weights / tl.sum(weights, 0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    values = tl.load(
        partial + slots[:, None] * R + r[None, :], mask=stored[:, None] & (r < R)[None, :], other=0.0
    )
    queries = tl.num_programs(0) // H
    out = context + ((row % H).to(tl.int64) * queries + query) * R + r
    tl.store(out, tl.sum(weights[:, None] * values, 0).to(context.dtype.element_ty), mask=r < R)
