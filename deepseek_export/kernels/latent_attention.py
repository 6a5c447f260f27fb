"""``dsx::LatentAttention`` 的 Triton kernel：split-KV 的 latent 注意力，partial 一遍、reduce 一遍，累加都在 float32。

契约（:data:`~deepseek_export.ops.table.LATENT_ATTENTION`）：``q [B,S,H,r+dr]`` 已吸收 W_UK；``kv_cache [B,1,T,r+dr]`` 已写入本次的
S 行，序列 b 的有效长度是 ``past_lens[b] + S``（超出 T 的部分不读）；key j 对第 i 个 query 可见当且仅当 ``j <= past_lens[b] + i``。
同一行 latent 既是 K（全部列）又是 V（前 r 列），只从显存读一遍。一个 key 都看不见的 query 得到零，不是 NaN。

(s, h) 合并成一维 ``row = s*H + h``，一个程序处理 ``BLOCK_M`` 行与一段 key。段长由每个序列自己的长度决定
（:func:`split_length`），所以长短不一的 batch 里每个程序的工作量相近，容量 T 再大也不多算。只用到一段的序列由 partial
直接写结果，reduce 跳过它。
"""

import triton
import triton.language as tl


@triton.jit
def valid_keys(past_lens, b, S, T):
    """序列 b 的有效长度，限制在 [0, T]。"""
    return tl.minimum(tl.maximum(tl.load(past_lens + b).to(tl.int32) + S, 0), T)


@triton.jit
def split_length(keys, num_splits, BLOCK_N: tl.constexpr):
    """每段的 key 数：把 ``keys`` 均分成至多 ``num_splits`` 段，凑整到 ``BLOCK_N``。"""
    return tl.cdiv(tl.cdiv(keys, num_splits), BLOCK_N) * BLOCK_N


@triton.jit
def latent_attention_partial(
    q,  # [B, S, H, R+P]
    kv_cache,  # [B, 1, T, R+P]
    past_lens,  # [B] int64
    context,  # [B, S, H, R]，只用到一段的序列直接写这里
    partial,  # [B, num_splits, S*H, R] float32，各段已归一化的结果
    lse,  # [B, num_splits, S*H] float32，各段的 log2(sum(2^score))
    scale,
    S,
    H,
    T,
    num_splits,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)  # B*T*(R+P) 会超出 int32
    keys = valid_keys(past_lens, b, S, T)
    length = split_length(keys, num_splits, BLOCK_N)
    start = split * length
    end = tl.minimum(start + length, keys)
    if (split > 0) & (start >= end):
        return

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    live, in_r, in_p = (rows < S * H)[:, None], (r < R)[None, :], (p < P)[None, :]
    visible = tl.minimum(tl.load(past_lens + b).to(tl.int32) + rows // H + 1, keys)
    q_rows = q + (b * (S * H) + rows)[:, None] * (R + P)
    q_latent = tl.load(q_rows + r[None, :], mask=live & in_r, other=0.0)
    q_pe = tl.load(q_rows + R + p[None, :], mask=live & in_p, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        stored = (key < end)[:, None]  # 之后的行可能是 NaN：不读，而不是读了再乘零
        kv_rows = kv_cache + (b * T + key)[:, None] * (R + P)
        latent = tl.load(kv_rows + r[None, :], mask=stored & in_r, other=0.0).to(q_latent.dtype)
        k_pe = tl.load(kv_rows + R + p[None, :], mask=stored & in_p, other=0.0).to(q_latent.dtype)
        scores = tl.dot(q_latent, tl.trans(latent), out_dtype=tl.float32)
        scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
        scores *= scale * 1.4426950408889634  # log2(e)：之后用 exp2
        scores = tl.where(key[None, :] < visible[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # 整段都看不见时避免 inf - inf
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc=acc * decay[:, None], out_dtype=tl.float32)
        top = new_top

    divisor = tl.where(total > 0.0, total, 1.0)
    acc = acc / divisor[:, None]
    if length >= keys:
        out = context + (b * (S * H) + rows)[:, None] * R + r[None, :]
        tl.store(out, acc.to(context.dtype.element_ty), mask=live & in_r)
    else:
        slots = (b * num_splits + split) * (S * H) + rows
        tl.store(partial + slots[:, None] * R + r[None, :], acc, mask=live & in_r)
        tl.store(lse + slots, tl.where(total > 0.0, top + tl.log2(divisor), float("-inf")), mask=rows < S * H)


@triton.jit
def latent_attention_reduce(
    past_lens,
    context,
    partial,
    lse,
    S,
    H,
    T,
    num_splits,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """把一行的各段按 ``2^lse`` 加权平均；参数同 :func:`latent_attention_partial`。

    一次读 ``BLOCK_S`` 段：批小而上下文长时有一百多段，一段一段地读就要等一百多次显存的延迟（还没有在 GPU 上量过）。
    """
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    keys = valid_keys(past_lens, b, S, T)
    length = split_length(keys, num_splits, BLOCK_N)
    if length >= keys:
        return
    splits = tl.cdiv(keys, length)
    rows = S * H
    first = b * num_splits * rows + row
    out = context + (b * rows + row) * R
    for block in range(tl.program_id(2), tl.cdiv(R, BLOCK_R), tl.num_programs(2)):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            slots = first + split * rows
            stored = split < splits  # 之后的格子没有写过
            scores = tl.load(lse + slots, mask=stored, other=float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - base)
            decay = tl.exp2(top - base)
            total = total * decay + tl.sum(weights, 0)
            values = tl.load(
                partial + slots[:, None] * R + r[None, :], mask=stored[:, None] & (r < R)[None, :], other=0.0
            )
            acc = acc * decay + tl.sum(weights[:, None] * values, 0)
            top = new_top
        acc = acc / tl.where(total > 0.0, total, 1.0)
        tl.store(out + r, acc.to(context.dtype.element_ty), mask=r < R)
