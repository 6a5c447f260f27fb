"""``dsx::LatentAttention`` 的启动表：在每种形状与 SM 上用多大的块、怎样的网格、多少 workspace。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import SM_COUNT, LaunchTable, Variant
from deepseek_export.kernels.table import (
    ALIGNMENT,
    SMS,
    KernelDtype,
    KernelSpec,
    Problem,
    block_size,
    cached_problem,
    fewer_keys,
    float32,
    int32,
    launch,
    row_width,
    scratch,
)
from deepseek_export.ops.spec import OpSpec
from deepseek_export.ops.table import LATENT_ATTENTION


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """``latent_attention_partial`` 的块。

    Attributes:
        rows: ``BLOCK_M``，(s, h) 合并后的行。
        keys: ``BLOCK_N``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
        apart: ``APART``，QKᵀ 的布局不随 PV 的。
        clear: ``CLEAR``，每一行都看得见的整块另走一个循环。
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    apart: bool = False
    clear: bool = False


#: 共享内存上限 → 各变体的块，行数升序；按 r=512、dr=64、两字节的缓存定的，编译测试核对每个都放得下。Hopper 起的 64 行是
#: 一个 wgmma 的高度；更早的卡上 64 行的累加器会溢出寄存器，所以用 32 行。级数按共享内存取得
#: 尽量多：一段 KV 在算的时候，下一段已经在路上。warp 的个数由机器码的审计定（:mod:`.audit`）：分数的 M×N 摊到的 warp 多于它的
#: 16×8 小块时，QKᵀ 会重复计算；99 KiB 的卡上放不下两段 32 个 key，宁可重复一些也要重叠。
_ATTENTION_TILES: Mapping[int, tuple[AttentionTile, ...]] = MappingProxyType(
    {
        99 << 10: (AttentionTile(16, 32, 4, 3), AttentionTile(32, 16, 4, 3)),
        163 << 10: (AttentionTile(16, 32, 4, 4), AttentionTile(32, 32, 4, 4)),
        227 << 10: (AttentionTile(16, 64, 4, 3), AttentionTile(64, 32, 8, 4)),
    }
)
#: Hopper 自己的：64 行的块断开两个 dot 之后 QKᵀ 只算一遍；一次 32 个 key，放得下三段，拷贝与计算才重叠；不遮的另走一个循环，指令才少到张量核发射槽的八成。
#: Blackwell 断开反而多同步几次，不用。
_HOPPER_TILES = (AttentionTile(16, 64, 4, 3), AttentionTile(64, 32, 8, 3, apart=True, clear=True))
#: int8 的缓存：一个 key 的字节少四成多，展宽的码占寄存器，所以用 8 个 warp，另有一份；99 KiB 的卡上放不下两段 64 个 key，宁可重复一些 QKᵀ 也要重叠。
_INT8_TILES: Mapping[int, tuple[AttentionTile, ...]] = MappingProxyType(
    {
        99 << 10: (AttentionTile(16, 32, 8, 3), AttentionTile(32, 32, 8, 3)),
        163 << 10: (AttentionTile(16, 64, 8, 3), AttentionTile(32, 64, 8, 3)),
        227 << 10: (AttentionTile(16, 64, 8, 3), AttentionTile(64, 32, 8, 4)),
    }
)
_INT8_HOPPER_TILES = (AttentionTile(16, 64, 8, 3), AttentionTile(64, 32, 8, 4, apart=True))
#: 一次看几个序列的长度。
_SEQUENCES = 128
#: 平均一个程序有这么多块 key 的，按整块分，差一块不过一成的一半；更少的按一个一个的 key 分，一个程序至少分 16 个（tl.dot 的下限）。
PLENTY, LEAST = 16, 16
#: ``latent_attention_reduce`` 的块：一次几份、几列，几个 warp。
_REDUCE_PARTS, _REDUCE_COLUMNS, _REDUCE_WARPS = 64, 128, 4


def attention_problem(
    op: OpSpec,
    sm: int,
    num_heads: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    dtype: str,
    cache_dtype: str | None,
    **more: int,
) -> Problem:
    """latent 注意力的一个问题，稀疏的也是；参数同 :func:`latent_attention_launch`，``more`` 是另外的维。

    Raises:
        DsxError: 同 :func:`latent_attention_launch`。
    """
    r, dr = kv_lora_rank, qk_rope_head_dim
    sizes = {"H": num_heads, "r": r, "r+dr": r + dr, "cw": row_width(r, dr, cache_dtype or dtype)} | more
    problem = cached_problem(op, "kv_cache", sm, sizes, dtype, cache_dtype)
    if r > 512 or dr > 64:
        raise DsxError("DSX-E903", f"kv_lora_rank={r}、qk_rope_head_dim={dr}", "kernel 支持到 512 与 64")
    return problem


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
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。``int8`` 的一行见 :mod:`~deepseek_export.ops.int8_cache`。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 r、dr 太大。
    """
    r, dr = kv_lora_rank, qk_rope_head_dim
    problem = attention_problem(LATENT_ATTENTION, sm, num_heads, r, dr, dtype, cache_dtype)
    limits = SMS[sm]
    B, S, T = symbol("B"), symbol("S"), symbol("T")
    rows = S * num_heads
    stored = problem.dtypes["C"]
    blocks = {"R": r, "BLOCK_R": block_size(r)}
    tiles = _tiles(sm, stored)
    columns = min(block_size(r), _REDUCE_COLUMNS)
    # 行数刚够一个小块时用小块，否则用最大的块，让同一段 KV 少读几遍。
    variants = []
    for tile in tiles:
        keys, num_stages = fewer_keys(tile.keys, tile.num_stages, stored)
        row_blocks = rows.ceil(tile.rows)
        # 每个 SM 一个程序，一轮跑完；活少的时候一个程序至少 LEAST 个 key。没有 key 的序列也有一格。
        cells = B * row_blocks * T.ceil(LEAST).max(1)
        programs, most = symbol(SM_COUNT).min(limits.most).min(cells), Expression.of(limits.most).min(cells)
        lse_at, shared_at, _ = _layout(programs, tile.rows, r)
        results = (
            problem.port("context"),
            scratch("partial", "float32", 0),
            scratch("lse", "float32", lse_at),
            scratch("shared_rows", "int32", shared_at),
        )
        sizes_of_rows = (int32("B", B), int32("S", S), int32("H", num_heads))
        partial = launch(
            "latent_attention",
            "latent_attention_partial",
            (programs, 1, 1),
            (
                *map(problem.port, ("q", "kv_cache", "past_lens")),
                *results,
                float32("scale", scale),
                *sizes_of_rows,
                int32("T", T),
            ),
            {
                **blocks,
                "P": dr,
                "WIDTH": problem.sizes["cw"],
                "INT8": int(stored == "int8"),
                "BLOCK_P": block_size(2 * dr if stored == "int8" else dr),
                "BLOCK_M": tile.rows,
                "BLOCK_N": keys,
                "BLOCK_B": _SEQUENCES,
                "PLENTY": PLENTY,
                "LEAST": LEAST,
                "APART": int(tile.apart),
                "CLEAR": int(tile.clear),
            },
            tile.num_warps,
            num_stages,
        )
        reduce = launch(
            "latent_attention",
            "latent_attention_reduce",
            # 合看的行块不多于程序，也不多于行块；只有一个程序时没有。
            (
                rows.min(tile.rows),
                Expression.of(2).at_most(programs) * programs.min(B * row_blocks),
                math.ceil(r / columns),
            ),
            (*results, *sizes_of_rows, int32("programs", programs)),
            {
                "R": r,
                "BLOCK_R": columns,
                "BLOCK_S": _REDUCE_PARTS,
                "BLOCK_M": tile.rows,
                "MOST": block_size(limits.most),
            },
            _REDUCE_WARPS,
            1,
        )
        when = Expression.of(1) if tile is tiles[-1] else rows.at_most(tile.rows)
        variants.append(Variant(when, _layout(most, tile.rows, r)[2], (partial, reduce)))
    return problem.table(variants)


def _tiles(sm: int, cache_dtype: str) -> tuple[AttentionTile, ...]:
    """各变体的块，行数升序。"""
    shared = SMS[sm].shared
    if cache_dtype == "int8":
        return _INT8_HOPPER_TILES if sm == 90 else _INT8_TILES[shared]
    return _HOPPER_TILES if sm == 90 else _ATTENTION_TILES[shared]


def _layout(programs: Expression, rows: int, r: int) -> tuple[Expression, Expression, Expression]:
    """workspace：各程序两个格位的结果，两个格位的 lse，合看的记录；后两块在第几个字节，一共几个字节。"""
    lse_at = (programs * (2 * rows * 4 * r)).align(ALIGNMENT)
    shared_at = lse_at + (programs * (2 * rows * 4)).align(ALIGNMENT)
    return lse_at, shared_at, shared_at + programs * 8
