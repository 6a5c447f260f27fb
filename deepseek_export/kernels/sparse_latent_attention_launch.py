"""``dsx::SparseLatentAttention`` 的启动表：在每种形状与 SM 上用多大的块、怎样的网格、多少 workspace。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.latent_attention_launch import AttentionTile, attention_problem
from deepseek_export.kernels.program import SM_COUNT, LaunchTable, Variant
from deepseek_export.kernels.table import (
    ALIGNMENT,
    SMS,
    KernelDtype,
    KernelSpec,
    block_size,
    fewer_keys,
    float32,
    int32,
    launch,
    scratch,
)
from deepseek_export.ops.table import SPARSE_LATENT_ATTENTION

#: 共享内存上限 → 头数装得进 16 行的块，与更多头的块；按 r=512、dr=64、两字节的缓存，由机器码的审计定的（:mod:`.audit`）：每一行有自己的地址，
#: 一个线程搬的行越多，占的寄存器越多，所以 Hopper 起也用 32 行，64 行的累加器之外放不下它们。
_TILES: Mapping[int, tuple[AttentionTile, AttentionTile]] = MappingProxyType(
    {
        99 << 10: (AttentionTile(16, 32, 4, 3), AttentionTile(32, 16, 4, 3)),
        163 << 10: (AttentionTile(16, 32, 4, 4), AttentionTile(32, 32, 4, 4)),
        227 << 10: (AttentionTile(16, 64, 8, 3), AttentionTile(32, 64, 8, 3)),
    }
)
#: ``sparse_latent_attention_reduce`` 的块：几列，几个 warp。
_REDUCE_COLUMNS, _REDUCE_WARPS = 64, 4


def sparse_latent_attention_launch(
    sm: int,
    num_heads: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    topk: int,
    scale: float,
    dtype: KernelDtype,
    cache_dtype: str | None = None,
) -> LaunchTable[KernelSpec]:
    """``dsx::SparseLatentAttention`` 的启动表。

    Args:
        sm: 计算能力。
        num_heads: H。
        kv_lora_rank, qk_rope_head_dim: r、dr。
        topk: ks。
        scale: softmax 缩放。
        dtype: ``q`` 与输出的 dtype。
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 r、dr 太大。
    """
    r, dr = kv_lora_rank, qk_rope_head_dim
    problem = attention_problem(SPARSE_LATENT_ATTENTION, sm, num_heads, r, dr, dtype, cache_dtype, ks=topk)
    limits = SMS[sm]
    small, large = _TILES[limits.shared]
    tile = small if num_heads <= small.rows else large
    keys, num_stages = fewer_keys(tile.keys, tile.num_stages, problem.dtypes["F"])
    most_splits, blocks = math.ceil(topk / keys), math.ceil(num_heads / tile.rows)
    queries = symbol("B") * symbol("S")
    programs = queries * blocks
    # 每个 SM 一个线程块，一轮跑完；至少一段，不超过名额里的块数。max(1) 也顾及 B 或 S 为 0。
    splits = (symbol(SM_COUNT).min(limits.most) // programs.max(1)).max(1).min(most_splits)
    # 不止一段时 programs*splits 不超过 SM 数的上限，只有一段时不用 workspace：所以它不随 B、S 变大。
    slots = (programs * most_splits).min(limits.most) * tile.rows
    partial_bytes = (slots * (4 * r)).align(ALIGNMENT)
    results = (
        problem.port("counts"),
        problem.port("context"),
        scratch("partial", "float32", 0),
        scratch("lse", "float32", partial_bytes),
    )
    heads, split_count = int32("H", num_heads), int32("num_splits", splits)
    constants = {"TOPK": topk, "R": r}
    partial = launch(
        "sparse_latent_attention",
        "sparse_latent_attention_partial",
        (programs, splits, 1),
        (
            *map(problem.port, ("q", "kv_cache", "indices")),
            *results,
            float32("scale", scale),
            int32("S", symbol("S")),
            heads,
            int32("T", symbol("T")),
            split_count,
        ),
        {
            **constants,
            "P": dr,
            "BLOCK_R": block_size(r),
            "BLOCK_P": block_size(dr),
            "BLOCK_M": tile.rows,
            "BLOCK_N": keys,
        },
        tile.num_warps,
        num_stages,
    )
    columns = min(block_size(r), _REDUCE_COLUMNS)
    reduce = launch(
        "sparse_latent_attention",
        "sparse_latent_attention_reduce",
        # 只有一段时 partial 直接写了结果，不必启动。
        (queries * num_heads, Expression.of(2).at_most(splits) * math.ceil(r / columns), 1),
        (*results, heads, split_count),
        {**constants, "BLOCK_R": columns, "BLOCK_S": block_size(most_splits), "BLOCK_N": keys},
        _REDUCE_WARPS,
        1,
    )
    return problem.table([Variant(Expression.of(1), partial_bytes + slots * 4, (partial, reduce))])
