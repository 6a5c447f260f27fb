"""``dsx::IndexTopK`` 的启动表：在每种形状与 SM 上用多大的块、怎样的网格、多少 workspace。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import SM_COUNT, Launch, LaunchTable, Variant
from deepseek_export.kernels.table import (
    SMS,
    KernelDtype,
    KernelSpec,
    block_size,
    cached_problem,
    fewer_keys,
    int32,
    launch,
    scratch,
)
from deepseek_export.ops.table import INDEX_TOPK


@dataclass(frozen=True, slots=True)
class IndexTile:
    """打分的块；行是全部索引头。

    Attributes:
        keys: ``BLOCK_N``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
    """

    keys: int
    num_warps: int
    num_stages: int


#: 共享内存上限 → 打分的块；按 64 个头、宽 128、两字节的缓存定的。
_TILES: Mapping[int, IndexTile] = MappingProxyType(
    {99 << 10: IndexTile(64, 4, 3), 163 << 10: IndexTile(64, 4, 4), 227 << 10: IndexTile(64, 4, 4)}
)
#: 挑选一次读几个分数，几个 warp。
_SELECT_BLOCK, _SELECT_WARPS = 2048, 8
#: 这么多 query 以内分段打分，分数全部存下；再多就一个程序从头到尾做一个 query。不小于任何一种卡的 SM 数。
SPLIT_QUERIES = 256
_MAX_HEADS, _MAX_WIDTH = 128, 128


def index_topk_launch(
    sm: int,
    num_heads: int,
    head_dim: int,
    topk: int,
    dtype: KernelDtype,
    cache_dtype: str | None = None,
) -> LaunchTable[KernelSpec]:
    """``dsx::IndexTopK`` 的启动表。

    Args:
        sm: 计算能力。
        num_heads, head_dim: Hi、di。
        topk: ks。
        dtype: ``q`` 的 dtype。
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 Hi、di 太大。
    """
    sizes = {"Hi": num_heads, "di": head_dim, "ks": topk}
    problem = cached_problem(INDEX_TOPK, "index_cache", sm, sizes, dtype, cache_dtype)
    if num_heads > _MAX_HEADS or head_dim > _MAX_WIDTH:
        what = f"index_n_heads={num_heads}、index_head_dim={head_dim}"
        raise DsxError("DSX-E903", what, f"kernel 支持到 {_MAX_HEADS} 与 {_MAX_WIDTH}")
    limits = SMS[sm]
    tile = _TILES[limits.shared]
    keys, _ = fewer_keys(tile.keys, tile.num_stages, problem.dtypes["F"])
    scoring = {
        "TOPK": topk,
        "D": head_dim,
        "BLOCK_D": block_size(head_dim),
        "BLOCK_M": block_size(num_heads),
        "BLOCK_N": keys,
    }
    queries, T = symbol("B") * symbol("S"), symbol("T")
    programs = symbol(SM_COUNT).min(limits.most)
    # 每个 SM 一个线程块，一轮跑完；至少一段，不超过容量里的块数。max(1) 也顾及 B 或 S 为 0。
    splits = (programs // queries.max(1)).max(1).min(T.ceil(keys))
    inputs = tuple(map(problem.port, ("q", "w", "index_cache", "past_lens")))
    outputs = tuple(map(problem.port, ("indices", "counts")))
    scores, rows = scratch("scores", "float32", 0), int32("S", symbol("S"))
    shape = (rows, int32("H", num_heads), int32("T", T))

    def step(function: str, grid: tuple[Expression, Expression], *rest) -> Launch[KernelSpec, Expression]:
        return launch("index_topk", function, (*grid, Expression.of(1)), *rest)

    one = Expression.of(1)
    score = step(
        "index_topk_scores",
        (queries, splits),
        (*inputs, scores, *shape, int32("num_splits", splits)),
        scoring,
        tile.num_warps,
        tile.num_stages,
    )
    select = step(
        "index_topk_select",
        (queries, one),
        (inputs[-1], scores, *outputs, rows, int32("T", T)),
        {"TOPK": topk, "BLOCK": _SELECT_BLOCK},
        _SELECT_WARPS,
        1,
    )
    whole = step(
        "index_topk_rows",
        (queries.min(programs), one),
        (*inputs, *outputs, scores, int32("queries", queries), *shape),
        {**scoring, "BLOCK": _SELECT_BLOCK},
        tile.num_warps,
        tile.num_stages,
    )
    variants = (
        Variant(queries.at_most(SPLIT_QUERIES), queries.min(SPLIT_QUERIES) * T * 4, (score, select)),
        Variant(one, queries.min(limits.most) * T * 4, (whole,)),
    )
    return problem.table(variants)
