"""``dsx::LatentAttention`` 的 Triton kernel：latent 注意力，partial 一遍、reduce 一遍，累加都在 float32。

契约（:data:`~deepseek_export.ops.table.LATENT_ATTENTION`）：``q [B,S,H,r+dr]`` 已吸收 W_UK；``kv_cache [B,1,T,r+dr]`` 已写入本次的
S 行，序列 b 的有效长度是 ``past_lens[b] + S``（超出 T 的部分不读）；key j 对第 i 个 query 可见当且仅当 ``j <= past_lens[b] + i``。
同一行 latent 既是 K（全部列）又是 V（前 r 列），只从显存读一遍。一个 key 都看不见的 query 得到零，不是 NaN。

(s, h) 合并成一维 ``row = s*H + h``，每 ``BLOCK_M`` 行一块。活是一格一格的：一块行看一块 key（``BLOCK_N`` 个），全部的格子按（序列、行块、key 块）排成一列，
每个程序拿连着的一段，各段至多差一格（:func:`span_start`）。长度在设备上读，所以长短不一的 batch、任何 B 都摊得匀，容量 T 再大也不多算。
``APART``：Triton 见一个 dot 的结果流进另一个 dot，就把它的各行分给全部的 warp；64 行只够一半的 warp 分，于是 QKᵀ 由两组 warp 各算一遍。总是成立、编译器却
看不出来的两个条件把这条流断开，它就按块的形状分。哪些块要断开，由机器码的审计定。

一段里整块行都看完的，partial 直接写结果；头尾各有至多一块行与别的程序合看，写进程序自己的两个格位，谁合看记在 ``shared_rows``，由 reduce 合起来。
"""

import triton
import triton.language as tl


@triton.jit
def valid_keys(past_lens, b, B, S, T):
    """序列 b 的有效长度，限制在 [0, T]；b 不在 [0, B) 的是 0。"""
    past = tl.load(past_lens + b, mask=b < B, other=0).to(tl.int32)
    return tl.where(b < B, tl.minimum(tl.maximum(past + S, 0), T), 0)


@triton.jit
def split_length(keys, num_splits, BLOCK_N: tl.constexpr):
    """每段的 key 数：把 ``keys`` 均分成至多 ``num_splits`` 段，凑整到 ``BLOCK_N``；稀疏的注意力与索引器用它分段。"""
    return tl.cdiv(tl.cdiv(keys, num_splits), BLOCK_N) * BLOCK_N


@triton.jit
def key_blocks(past_lens, b, B, S, T, BLOCK_N: tl.constexpr):
    """序列 b 有几块 key；没有 key 的也算一块，它的结果是零，要有人写。b 不在 [0, B) 的没有。"""
    return tl.where(b < B, tl.maximum(tl.cdiv(valid_keys(past_lens, b, B, S, T), BLOCK_N), 1), 0)


@triton.jit
def find_block(block, past_lens, B, S, T, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """各序列的 key 块首尾相接，第 ``block`` 块在哪个序列，那个序列之前有几块，一共几块。"""
    sequence, before, total = 0, 0, 0
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        blocks = key_blocks(past_lens, b, B, S, T, BLOCK_N)
        passed = (total + tl.cumsum(blocks, 0) <= block) & (b < B)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, blocks, 0), 0)
        total += tl.sum(blocks, 0)
    return sequence, before, total


@triton.jit
def span_start(program, total, programs):
    """第 ``program`` 个程序从哪一格做起：前 ``total % programs`` 个多做一格。"""
    return program * (total // programs) + tl.minimum(program, total % programs)


@triton.jit
def owner(cell, total, programs):
    """第 ``cell`` 格归哪个程序，:func:`span_start` 的逆。"""
    least, more = total // programs, total % programs
    rest = tl.maximum(cell - more * (least + 1), 0) // tl.maximum(least, 1)
    return tl.where(cell < more * (least + 1), cell // (least + 1), more + rest)


@triton.jit
def latent_attention_partial(
    q,  # [B, S, H, R+P]
    kv_cache,  # [B, 1, T, R+P]
    past_lens,  # [B] int64
    context,  # [B, S, H, R]，一个程序看完的行直接写这里
    partial,  # [程序, 2, BLOCK_M, R] float32，没有看完的，已归一化；第 1 格是开了头的那一块行，第 0 格是接着别人看的
    lse,  # [程序, 2, BLOCK_M] float32，各自的 log2(sum(2^score))
    shared_rows,  # [程序, 2] int32：开了头、没有看完的是哪一块行，之后几个程序接着看；没有时后一个数是 0
    scale,
    B,
    S,
    H,
    T,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    APART: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_blocks = tl.cdiv(S * H, BLOCK_M)
    total = find_block(0, past_lens, B, S, T, BLOCK_N, BLOCK_B)[2] * row_blocks
    cell, end = span_start(program, total, programs), span_start(program + 1, total, programs)
    sequence, before, _ = find_block(cell // row_blocks, past_lens, B, S, T, BLOCK_N, BLOCK_B)
    inside = cell - before * row_blocks
    blocks = tl.maximum(key_blocks(past_lens, sequence, B, S, T, BLOCK_N), 1)
    row_block, first = inside // blocks, inside % blocks
    unfinished, followers = 0, 0

    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_r, in_p = (r < R)[None, :], (p < P)[None, :]
    while cell < end:
        b = sequence.to(tl.int64)  # B*T*(R+P) 会超出 int32
        keys = valid_keys(past_lens, sequence, B, S, T)
        blocks = key_blocks(past_lens, sequence, B, S, T, BLOCK_N)
        last = tl.minimum(first + end - cell, blocks)
        stop = tl.minimum(last * BLOCK_N, keys)

        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (rows < S * H)[:, None]
        visible = tl.minimum(tl.load(past_lens + b).to(tl.int32) + rows // H + 1, keys)
        q_rows = q + (b * (S * H) + rows)[:, None] * (R + P)
        q_latent = tl.load(q_rows + r[None, :], mask=live & in_r, other=0.0)
        q_pe = tl.load(q_rows + R + p[None, :], mask=live & in_p, other=0.0)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for n in range(first * BLOCK_N, stop, BLOCK_N):
            key = n + tl.arange(0, BLOCK_N)
            stored = (key < stop)[:, None]  # 之后的行可能是 NaN：不读，而不是读了再乘零
            kv_rows = kv_cache + (b * T + key)[:, None] * (R + P)
            latent = tl.load(kv_rows + r[None, :], mask=stored & in_r, other=0.0).to(q_latent.dtype)
            k_pe = tl.load(kv_rows + R + p[None, :], mask=stored & in_p, other=0.0).to(q_latent.dtype)
            if APART:
                scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if T > 0:
                    scores = tl.dot(q_latent, tl.trans(latent), acc=scores, out_dtype=tl.float32)
                if S > 0:
                    scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
            else:
                scores = tl.dot(q_latent, tl.trans(latent), out_dtype=tl.float32)
                scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
            scores *= scale * 1.4426950408889634  # log2(e)：之后用 exp2
            scores = tl.where(key[None, :] < visible[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # 整段都看不见时避免 inf - inf
            weights = tl.exp2(scores - base[:, None])
            decay = tl.exp2(top - base)
            sums = sums * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(latent.dtype), latent, acc=acc * decay[:, None], out_dtype=tl.float32)
            top = new_top

        divisor = tl.where(sums > 0.0, sums, 1.0)
        acc = acc / divisor[:, None]
        if (first == 0) & (last == blocks):
            out = context + (b * (S * H) + rows)[:, None] * R + r[None, :]
            tl.store(out, acc.to(context.dtype.element_ty), mask=live & in_r)
        else:
            slot = program * 2 + (first == 0).to(tl.int32)
            slots = slot * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partial + slots[:, None] * R + r[None, :], acc, mask=live & in_r)
            tl.store(lse + slots, tl.where(sums > 0.0, top + tl.log2(divisor), float("-inf")))
        if (first == 0) & (last < blocks):
            unfinished = sequence * row_blocks + row_block
            followers = owner(cell + blocks - 1, total, programs) - program
        cell += last - first
        first = 0
        row_block += 1
        sequence += row_block // row_blocks
        row_block = row_block % row_blocks
    tl.store(shared_rows + program * 2, unfinished)
    tl.store(shared_rows + program * 2 + 1, followers)


@triton.jit
def latent_attention_reduce(
    context,
    partial,
    lse,
    shared_rows,
    S,
    H,
    programs,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MOST: tl.constexpr,
):
    """把几个程序合看的行按 ``2^lse`` 加权平均；第 1 维的程序号是第几块这样的行。参数同 :func:`latent_attention_partial`。

    一次读 ``BLOCK_S`` 份：批小而上下文长时有一百多份，一份一份地读就要等一百多次显存的延迟（还没有在 GPU 上量过）。
    """
    program = tl.arange(0, MOST)
    followers = tl.load(shared_rows + program * 2 + 1, mask=program < programs, other=0)
    nth = tl.cumsum((followers > 0).to(tl.int32), 0)
    mine = (nth == tl.program_id(1) + 1) & (followers > 0)
    parts = tl.sum(tl.where(mine, followers, 0), 0) + 1
    if parts == 1:
        return
    starter = tl.sum(tl.where(mine, program, 0), 0)
    row_blocks = tl.cdiv(S * H, BLOCK_M)
    row_block = tl.load(shared_rows + starter * 2)
    inside = tl.program_id(0)
    row = row_block % row_blocks * BLOCK_M + inside
    if row >= S * H:
        return
    out = context + ((row_block // row_blocks).to(tl.int64) * (S * H) + row) * R
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        slots = ((starter + part) * 2 + (part == 0).to(tl.int32)) * BLOCK_M + inside
        stored = part < parts  # 之后的格子没有写过
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
