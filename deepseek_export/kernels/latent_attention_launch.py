"""``dsx::LatentAttention`` 的启动表：在每种形状与 SM 上用多大的块、怎样的网格、多少 workspace。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import SM_COUNT, LaunchTable, Variant
from deepseek_export.kernels.table import (
    ALIGNMENT,
    KernelDtype,
    KernelSpec,
    Problem,
    block_size,
    check_dtype,
    check_sm,
    float32,
    int32,
    launch,
    scratch,
)
from deepseek_export.ops.table import LATENT_ATTENTION


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """``latent_attention_partial`` 的块。

    Attributes:
        rows: ``BLOCK_M``，(s, h) 合并后的行。
        keys: ``BLOCK_N``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


#: 共享内存上限 → 各变体的块，行数升序；按 r=512、dr=64、两字节的缓存定的，编译测试核对每个都放得下。Hopper 起的 64 行是
#: 一个 wgmma 的高度；更早的卡上 64 行的累加器会溢出寄存器，所以用 32 行。级数按共享内存取得
#: 尽量多：一段 KV 在算的时候，下一段已经在路上。warp 的个数由机器码的审计定（:mod:`.audit`）：分数的 M×N 摊到的 warp 多于它的
#: 16×8 小块时，QKᵀ 会重复计算；99 KiB 的卡上放不下两段 32 个 key，宁可重复一些也要重叠。
_ATTENTION_TILES: Mapping[int, tuple[AttentionTile, ...]] = MappingProxyType(
    {
        99 << 10: (AttentionTile(16, 32, 4, 3), AttentionTile(32, 16, 4, 3)),
        163 << 10: (AttentionTile(16, 32, 4, 4), AttentionTile(32, 32, 4, 4)),
        227 << 10: (AttentionTile(16, 64, 4, 3), AttentionTile(64, 64, 8, 2)),
    }
)
#: ``latent_attention_reduce`` 的块：一次几段、几列，几个 warp。
_REDUCE_SPLITS, _REDUCE_COLUMNS, _REDUCE_WARPS = 64, 128, 4


def latent_attention_launch(
    sm: int,
    num_heads: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    scale: float,
    dtype: KernelDtype,
    cache_dtype: str | None = None,
) -> LaunchTable[KernelSpec]:
    """``dsx::LatentAttention`` 的启动表。

    Args:
        sm: 计算能力。
        num_heads: H。
        kv_lora_rank, qk_rope_head_dim: r、dr。
        scale: softmax 缩放。
        dtype: ``q`` 与输出的 dtype。
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 r、dr 太大。
    """
    limits, cache_dtype = check_sm(sm), cache_dtype or dtype
    check_dtype(LATENT_ATTENTION, "q", dtype, ("float16", "bfloat16"))
    check_dtype(LATENT_ATTENTION, "kv_cache", cache_dtype, ("float16", "bfloat16", "float32"))
    r, dr = kv_lora_rank, qk_rope_head_dim
    if r > 512 or dr > 64:
        raise DsxError("DSX-E903", f"kv_lora_rank={r}、qk_rope_head_dim={dr}", "kernel 支持到 512 与 64")
    sizes = {"H": num_heads, "r": r, "r+dr": r + dr}
    problem = Problem(LATENT_ATTENTION, sm, sizes, {"T": dtype, "F": cache_dtype})
    B, S, T = symbol("B"), symbol("S"), symbol("T")
    rows = S * num_heads
    blocks = {"R": r, "BLOCK_R": block_size(r)}
    tiles, columns = _ATTENTION_TILES[limits.shared], min(block_size(r), _REDUCE_COLUMNS)
    # 行数刚够一个小块时用小块，否则用最大的块，让同一段 KV 少读几遍。
    variants = []
    for tile in tiles:
        # float32 的缓存每个 key 占两倍共享内存：一次少读一半的 key，已经只有 16 个（tl.dot 的下限）的就少一级流水。
        fewer = tile.keys * 2 // DTYPES[cache_dtype].nbytes(1)
        keys, num_stages = (fewer, tile.num_stages) if fewer >= 16 else (16, tile.num_stages - 1)
        row_blocks = rows.ceil(tile.rows)
        # 每个 SM 一个线程块，一轮跑完；至少一段，不超过容量里的块数。max(1) 也顾及 B 或 S 为 0。
        splits = (symbol(SM_COUNT).min(limits.most) // (B * row_blocks).max(1)).max(1).min(T.ceil(keys))
        partial_bytes = (B * splits * rows * (4 * r)).align(ALIGNMENT)
        # B*splits*row_blocks 不超过 max(SM 数的上限, B*row_blocks)：这个上界随尺寸单调，段数却不是。
        slots = (B * row_blocks).max(limits.most) * tile.rows
        workspace = (slots * (4 * r)).align(ALIGNMENT) + slots * 4
        results = (
            problem.port("past_lens"),
            problem.port("context"),
            scratch("partial", "float32", 0),
            scratch("lse", "float32", partial_bytes),
        )
        integers = (int32("S", S), int32("H", num_heads), int32("T", T), int32("num_splits", splits))
        partial = launch(
            "latent_attention",
            "latent_attention_partial",
            (row_blocks, splits, B),
            (problem.port("q"), problem.port("kv_cache"), *results, float32("scale", scale), *integers),
            {**blocks, "P": dr, "BLOCK_P": block_size(dr), "BLOCK_M": tile.rows, "BLOCK_N": keys},
            tile.num_warps,
            num_stages,
        )
        reduce = launch(
            "latent_attention",
            "latent_attention_reduce",
            # 只有一段时 partial 直接写了结果，不必启动；段少时活也少，一个程序做几块列。
            (rows, B, Expression.of(2).at_most(splits) * splits.min(math.ceil(r / columns))),
            (*results, *integers),
            {"R": r, "BLOCK_R": columns, "BLOCK_S": _REDUCE_SPLITS, "BLOCK_N": keys},
            _REDUCE_WARPS,
            1,
        )
        when = Expression.of(1) if tile is tiles[-1] else rows.at_most(tile.rows)
        variants.append(Variant(when, workspace, (partial, reduce)))
    return problem.table(variants)
