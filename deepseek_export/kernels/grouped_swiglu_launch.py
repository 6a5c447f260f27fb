"""``dsx::MoeExperts`` 的启动表：在每种形状与 SM 上用多大的块、怎样的网格、多少 workspace。

排序、workspace 的布局与末尾的加权（:func:`experts_table`）与权重是码的 :mod:`.quantized_swiglu_launch` 共用。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from deepseek_export.dtypes import DTYPES
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import Launch, LaunchTable, Variant
from deepseek_export.kernels.table import (
    ALIGNMENT,
    KernelDtype,
    KernelSpec,
    Parameter,
    Problem,
    block_size,
    check_dtype,
    check_sm,
    int32,
    launch,
    scratch,
)
from deepseek_export.ops.table import MOE_EXPERTS


@dataclass(frozen=True, slots=True)
class ExpertsTile:
    """``gate_up`` 与 ``down`` 的块。

    Attributes:
        rows: ``BLOCK_M``，同一专家的 token。
        columns: ``BLOCK_N``；``gate_up`` 同时算两个矩阵，用它的一半。
        inner: ``BLOCK_K``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """两次矩阵乘要用的：workspace 里的各块，与有几个行块。

    Attributes:
        places: 由它们找到各行：``topk_ids``、排好的对、各专家的起点。
        hidden: SwiGLU 的中间结果，[N*k, I]。
        expert_out: 各对的输出，[N*k, D]。
        counts: 有几对，至多几个行块；多出来的程序立即退出。
        tiles: 至多几个行块。
    """

    places: tuple[Parameter, ...]
    hidden: Parameter
    expert_out: Parameter
    counts: tuple[Parameter, ...]
    tiles: Expression


_Launch: TypeAlias = Launch[KernelSpec, Expression]

#: 共享内存上限 → 各变体的块，行数升序。
_EXPERTS_TILES: Mapping[int, tuple[ExpertsTile, ...]] = MappingProxyType(
    {
        99 << 10: (ExpertsTile(16, 64, 128, 4, 3), ExpertsTile(64, 128, 64, 4, 3)),
        163 << 10: (ExpertsTile(16, 64, 128, 4, 4), ExpertsTile(128, 128, 64, 8, 3)),
        227 << 10: (ExpertsTile(16, 64, 128, 4, 5), ExpertsTile(128, 256, 64, 8, 3)),
    }
)
_SORT_BLOCK = 1024
#: 至多这么多对时不排序，两次矩阵乘的每个程序自己看一遍：解码的几行省一次启动。
FEW = 64
#: 几个行块一组，组内先走行。
GROUP = 8
_COMBINE_BLOCK = 1024


def experts_table(
    problem: Problem,
    tiles: Sequence[ExpertsTile],
    matmuls: Callable[[ExpertsTile, Rows], tuple[_Launch, _Launch]],
) -> LaunchTable[KernelSpec]:
    """专家算子的启动表：排序，两次矩阵乘，加权。

    Args:
        problem: E、k、D、I 与 ``T`` 已知。
        tiles: 各变体的块，行数升序。
        matmuls: 一个变体的 ``gate_up`` 与 ``down``。
    """
    E, k, D, inner = (problem.sizes[name] for name in ("E", "k", "D", "I"))
    dtype = problem.dtypes["T"]
    N = symbol("N")
    pairs = N * k
    # workspace：排序后的对、各专家的起点、SwiGLU 的中间结果、各对的输出，依次排列。
    offsets_at = (pairs * 4).align(ALIGNMENT)
    hidden_at = offsets_at + Expression.of((E + 1) * 4).align(ALIGNMENT)
    expert_out_at = hidden_at + (pairs * DTYPES[dtype].nbytes(inner)).align(ALIGNMENT)
    workspace = expert_out_at + pairs * DTYPES[dtype].nbytes(D)
    sorted_pairs, offsets = scratch("sorted_pairs", "int32", 0), scratch("offsets", "int32", offsets_at)
    places = (problem.port("topk_ids"), sorted_pairs, offsets)
    hidden, expert_out = scratch("hidden", dtype, hidden_at), scratch("expert_out", dtype, expert_out_at)

    sort = launch(
        "grouped_swiglu",
        "sort_pairs",
        (Expression.of(FEW + 1).at_most(pairs) * (E + 1), 1, 1),
        (problem.port("topk_ids"), sorted_pairs, offsets, int32("pairs", pairs), int32("E", E)),
        {"BLOCK": _SORT_BLOCK},
        4,
        1,
    )
    combine_block = min(_COMBINE_BLOCK, block_size(D))
    combine = launch(
        "grouped_swiglu",
        "combine",
        (N, Expression.of(D).ceil(combine_block), 1),
        (expert_out, *map(problem.port, ("topk_ids", "topk_weights", "y"))),
        {"TOP_K": k, "D": D, "E": E, "BLOCK_D": combine_block},
        4,
        1,
    )

    variants = []
    for tile in tiles:
        # 每个有 token 的专家至多一个不满的行块，所以行块数有这个上界；多出来的程序立即退出。
        row_tiles = pairs // tile.rows + pairs.min(E)
        counts = (int32("pairs", pairs), int32("row_tiles", row_tiles))
        gate_up, down = matmuls(tile, Rows(places, hidden, expert_out, counts, row_tiles))
        # 平均每个专家分到的 token 装不满一个大块时用小块：这时受限于读权重，大块只是空算。
        when = Expression.of(1) if tile is tiles[-1] else pairs.at_most(2 * tile.rows * E)
        variants.append(Variant(when, workspace, (sort, gate_up, down, combine)))
    return problem.table(variants)


def grouped_swiglu_launch(
    sm: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    moe_intermediate_size: int,
    dtype: KernelDtype,
) -> LaunchTable[KernelSpec]:
    """``dsx::MoeExperts`` 的启动表。

    Args:
        sm: 计算能力。
        num_experts, top_k: E、k。
        hidden_size, moe_intermediate_size: D、I。
        dtype: ``x``、权重与输出的 dtype。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持。
    """
    limits = check_sm(sm)
    check_dtype(MOE_EXPERTS, "x", dtype, ("float16", "bfloat16"))
    E, k, D, inner = num_experts, top_k, hidden_size, moe_intermediate_size
    problem = Problem(MOE_EXPERTS, sm, {"E": E, "k": k, "D": D, "I": inner}, {"T": dtype})

    def matmuls(tile: ExpertsTile, rows: Rows) -> tuple[_Launch, _Launch]:
        common = {
            "D": D,
            "INNER": inner,
            "E": E,
            "BLOCK_E": block_size(E),
            "BLOCK_M": tile.rows,
            "FEW": FEW,
            "GROUP": GROUP,
        }
        half = min(tile.columns // 2, block_size(inner))
        full = min(tile.columns, block_size(D))
        gate_up = launch(
            "grouped_swiglu",
            "gate_up",
            (rows.tiles * math.ceil(inner / half), 1, 1),
            (*map(problem.port, ("x", "w_gate", "w_up")), *rows.places, rows.hidden, *rows.counts),
            {"TOP_K": k, **common, "BLOCK_N": half, "BLOCK_K": min(tile.inner, block_size(D))},
            tile.num_warps,
            tile.num_stages,
        )
        down = launch(
            "grouped_swiglu",
            "down",
            (rows.tiles * math.ceil(D / full), 1, 1),
            (rows.hidden, problem.port("w_down"), *rows.places, rows.expert_out, *rows.counts),
            {**common, "BLOCK_N": full, "BLOCK_K": min(tile.inner, block_size(inner))},
            tile.num_warps,
            tile.num_stages,
        )
        return gate_up, down

    return experts_table(problem, _EXPERTS_TILES[limits.shared], matmuls)
