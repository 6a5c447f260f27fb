"""``dsx::LatentAttention`` 的 Triton kernel：latent 注意力，partial 一遍、reduce 一遍，累加都在 float32。

契约（:data:`~deepseek_export.ops.table.LATENT_ATTENTION`）：``q [B,S,H,r+dr]`` 已吸收 W_UK；``kv_cache [B,1,T,r+dr]`` 已写入本次的
S 行，序列 b 的有效长度是 ``past_lens[b] + S``（超出 T 的部分不读）；key j 对第 i 个 query 可见当且仅当 ``j <= past_lens[b] + i``。
同一行 latent 既是 K（全部列）又是 V（前 r 列），只从显存读一遍。一个 key 都看不见的 query 得到零，不是 NaN。

(s, h) 合并成一维 ``row = s*H + h``，每 ``BLOCK_M`` 行一块。活是一格一格的：一块行看一格 key，全部的格子按（序列、行块、key）排成一列，
每个程序拿连着的一段，各段至多差一格（:func:`span_start`）。一格几个 key 看活有多少（:func:`divide`）：多就是一块（``BLOCK_N`` 个），各段都从整块起；少就是一个，
差一块也嫌多。长度在设备上读，所以长短不一的 batch、任何 B 都摊得匀，容量 T 再大也不多算。
``APART``：Triton 见一个 dot 的结果流进另一个 dot，就把它的各行分给全部的 warp；64 行只够一半的 warp 分，于是 QKᵀ 由两组 warp 各算一遍。总是成立、编译器却
看不出来的两个条件把这条流断开，它就按块的形状分。``CLEAR``：每一行都看得见的整块 key 另走一个循环，不算遮罩，地址也不必逐个限制在末尾之内。哪些块要断开、
要另走，由机器码的审计定。

``INT8``：缓存的一行是码（:mod:`~deepseek_export.ops.int8_cache`，末尾补过零，:func:`.int8_rows.row_scales`）。码放进 q 的 dtype 是准的，在寄存器里展宽；
latent 的 scale 乘在分数与概率上，不乘在码上。概率乘的是 scale 与至今最大的那个 scale 之比，不超过 1，16 位浮点里才不会下溢；累加器以它为单位，最后乘回来。
旋转部分是高、低两段字节，一次点积：query 写两遍，低字节对着的那一遍除以 256。

一段里整块行都看完的，partial 直接写结果；头尾各有至多一块行与别的程序合看，写进程序自己的两个格位，谁合看记在 ``shared_rows``，由 reduce 合起来。
"""

import triton
import triton.language as tl

from deepseek_export.kernels.int8_rows import LEAST_SCALE, row_scales

#: 比任何分数都小的有限的数。
LOWEST = tl.constexpr(-1e30)


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
def key_cells(past_lens, b, B, S, T, unit):
    """序列 b 有几格，一格 ``unit`` 个 key；没有 key 的也算一格，它的结果是零，要有人写。b 不在 [0, B) 的没有。"""
    return tl.where(b < B, tl.maximum(tl.cdiv(valid_keys(past_lens, b, B, S, T), unit), 1), 0)


@triton.jit
def find_cell(cell, past_lens, B, S, T, unit, BLOCK_B: tl.constexpr):
    """各序列的格子首尾相接，第 ``cell`` 格在哪个序列，那个序列之前有几格，一共几格。"""
    sequence, before, total = 0, 0, 0
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        cells = key_cells(past_lens, b, B, S, T, unit)
        passed = (total + tl.cumsum(cells, 0) <= cell) & (b < B)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, cells, 0), 0)
        total += tl.sum(cells, 0)
    return sequence, before, total


@triton.jit
def divide(
    past_lens,
    B,
    S,
    T,
    row_blocks,
    programs,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PLENTY: tl.constexpr,
    LEAST: tl.constexpr,
):
    """一格几个 key，一共几格，分给前几个程序：平均一个程序有 ``PLENTY`` 块的，一格一块；不然一格一个 key，一个程序至少 ``LEAST`` 格。"""
    blocks = find_cell(0, past_lens, B, S, T, BLOCK_N, BLOCK_B)[2] * row_blocks
    keys = find_cell(0, past_lens, B, S, T, 1, BLOCK_B)[2] * row_blocks
    plenty = blocks >= PLENTY * programs
    used = tl.where(plenty, programs, tl.minimum(programs, tl.cdiv(keys, LEAST)))
    return tl.where(plenty, BLOCK_N, 1), tl.where(plenty, blocks, keys), used


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
def product(a, b, always, APART: tl.constexpr):
    """``a b``，累加在 float32；``always`` 总是正的，``APART`` 见模块说明。"""
    out = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    if APART:
        if always > 0:
            out = tl.dot(a, b, acc=out, out_dtype=tl.float32)
    else:
        out = tl.dot(a, b, acc=out, out_dtype=tl.float32)
    return out


@triton.jit
def context_row(row, b, B, S, H):
    """序列 b 的第 ``row`` 行（``s*H + h``）在输出里是第几行；输出头在最前，后面逐头乘 W_UV 不必再转置。"""
    return (row % H).to(tl.int64) * (B * S) + b * S + row // H


@triton.jit
def latent_attention_partial(
    q,  # [B, S, H, R+P]
    kv_cache,  # [B, 1, T, WIDTH]
    past_lens,  # [B] int64
    context,  # [H, B*S, R]，一个程序看完的行直接写这里
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
    WIDTH: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PLENTY: tl.constexpr,
    LEAST: tl.constexpr,
    APART: tl.constexpr,
    CLEAR: tl.constexpr,
):
    program = tl.program_id(0)
    scale *= 1.4426950408889634  # log2(e)：之后用 exp2
    row_blocks = tl.cdiv(S * H, BLOCK_M)
    unit, total, programs = divide(
        past_lens, B, S, T, row_blocks, tl.num_programs(0), BLOCK_N, BLOCK_B, PLENTY, LEAST
    )
    cell = tl.minimum(span_start(program, total, programs), total)
    end = tl.minimum(span_start(program + 1, total, programs), total)
    sequence, before, _ = find_cell(cell // row_blocks, past_lens, B, S, T, unit, BLOCK_B)
    inside = cell - before * row_blocks
    cells = tl.maximum(key_cells(past_lens, sequence, B, S, T, unit), 1)
    row_block, first = inside // cells, inside % cells
    unfinished, followers = 0, 0

    r, p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    PARTS: tl.constexpr = 2 if INT8 else 1  # 旋转部分的一个数占几列
    in_r, in_p = (r < R)[None, :], (p < P * PARTS)[None, :]
    while cell < end:
        b = sequence.to(tl.int64)  # B*T*WIDTH 会超出 int32
        keys = valid_keys(past_lens, sequence, B, S, T)
        cells = key_cells(past_lens, sequence, B, S, T, unit)
        last = tl.minimum(first + end - cell, cells)
        stop = tl.minimum(last * unit, keys)

        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (rows < S * H)[:, None]
        past = tl.load(past_lens + b).to(tl.int32)
        visible = tl.minimum(past + rows // H + 1, stop)
        cache = kv_cache + b * T * WIDTH  # 之后的偏移在一行缓存之内，int32 够用：地址少占一半寄存器
        q_rows = q + (b * (S * H) + rows)[:, None] * (R + P)
        q_latent = tl.load(q_rows + r[None, :], mask=live & in_r, other=0.0)
        column = p % P if INT8 else p
        q_pe = tl.load(q_rows + R + column[None, :], mask=live & in_p, other=0.0)
        if INT8:  # 低字节的那一半除以 256
            q_pe = (q_pe * tl.where(p < P, 1.0, 1.0 / 256)[None, :]).to(q_latent.dtype)

        top = tl.full([BLOCK_M], LOWEST, tl.float32)  # 有限的：整段都看不见时没有 inf - inf
        sums = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        measure = LEAST_SCALE  # INT8：至今最大的 scale，acc 以它为单位
        # CLEAR：先是每一行都看得见的整块，不必遮，也读不到末尾之后；再是其余的，至多几块。
        begin, clear = first * unit, tl.minimum(past + row_block * BLOCK_M // H + 1, stop)
        for rest in tl.static_range(1 - CLEAR, 2):
            until = stop if rest else begin + tl.maximum(clear - begin, 0) // BLOCK_N * BLOCK_N
            for n in range(begin, until, BLOCK_N):
                key = n + tl.arange(0, BLOCK_N)
                # 之后的行可能是 NaN，读了再乘零还是 NaN：末尾凑不满一块的，多出来的格子再读一遍这一段的最后一行，权重是 0。
                row = tl.minimum(key, stop - 1) if rest else key
                kv_rows = cache + row[:, None] * WIDTH
                latent = tl.load(kv_rows + r[None, :], mask=in_r, other=0).to(q_latent.dtype)
                k_pe = tl.load(kv_rows + R + p[None, :], mask=in_p, other=0).to(q_latent.dtype)
                if INT8:
                    latent_scale, rope_scale = row_scales(kv_rows + R + 2 * P, WIDTH - R - 2 * P)
                    scores = product(q_latent, tl.trans(latent), T, APART) * latent_scale[None, :]
                    scores += product(q_pe, tl.trans(k_pe), S, APART) * (rope_scale * 256.0)[None, :]
                elif APART:
                    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    if T > 0:
                        scores = tl.dot(q_latent, tl.trans(latent), acc=scores, out_dtype=tl.float32)
                    if S > 0:
                        scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
                else:
                    scores = tl.dot(q_latent, tl.trans(latent), out_dtype=tl.float32)
                    scores = tl.dot(q_pe, tl.trans(k_pe), acc=scores, out_dtype=tl.float32)
                if rest:
                    scores = tl.where(key[None, :] < visible[:, None], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - new_top[:, None])
                decay = tl.exp2(top - new_top)
                sums = sums * decay + tl.sum(weights, 1)
                if INT8:
                    largest = tl.maximum(measure, tl.max(latent_scale, 0))
                    weights *= (latent_scale / largest)[None, :]
                    decay *= measure / largest
                    measure = largest
                acc = tl.dot(weights.to(latent.dtype), latent, acc=acc * decay[:, None], out_dtype=tl.float32)
                top = new_top
            begin = until

        divisor = tl.where(sums > 0.0, sums, 1.0)
        acc = acc / divisor[:, None]
        if INT8:
            acc *= measure
        if (first == 0) & (last == cells):
            out = context + context_row(rows, b, B, S, H)[:, None] * R + r[None, :]
            tl.store(out, acc.to(context.dtype.element_ty), mask=live & in_r)
        else:
            slot = program * 2 + (first == 0).to(tl.int32)
            slots = slot * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(partial + slots[:, None] * R + r[None, :], acc, mask=live & in_r)
            tl.store(lse + slots, tl.where(sums > 0.0, top + tl.log2(divisor), float("-inf")))
        if (first == 0) & (last < cells):
            unfinished = sequence * row_blocks + row_block
            followers = owner(cell + cells - 1, total, programs) - program
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
    B,
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
    out = context + context_row(row, (row_block // row_blocks).to(tl.int64), B, S, H) * R
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
