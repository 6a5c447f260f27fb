"""``dsx::QuantizedLinear`` 的启动表。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_export.kernels.codes import CodeFormat, coded_problem
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.grouped_swiglu_launch import GROUP
from deepseek_export.kernels.program import LaunchTable, Variant
from deepseek_export.kernels.table import (
    SMS,
    KernelDtype,
    KernelSpec,
    Problem,
    block_size,
    int32,
    launch,
    scratch,
)
from deepseek_export.ops.table import QUANTIZED_LINEAR


@dataclass(frozen=True, slots=True)
class LinearTile:
    """一个变体的块。

    Attributes:
        rows, columns, inner: ``BLOCK_M``、``BLOCK_N``、``BLOCK_K``。
        num_stages: 见 :class:`~deepseek_export.kernels.table.KernelSpec`。
        most: 至多多少行用它，也就是最多几个行块；``None`` 不限，K 不切段。
    """

    rows: int
    columns: int
    inner: int
    num_stages: int
    most: int | None


#: 共享内存上限 → 各变体的块，行数升序：解码，几十行的草稿验证与短的 prefill，其余。
_TILES: Mapping[int, tuple[LinearTile, ...]] = MappingProxyType(
    {
        shared << 10: (
            LinearTile(16, 64, 128, stages, 16),
            LinearTile(64, 64, 64, stages, 64),
            LinearTile(64, 128, 64, stages - 1, None),
        )
        for shared, stages in ((99, 4), (163, 5), (227, 6))
    }
)
_WARPS = 4
#: 切段之后，一个 SM 上大约几个程序；一段至少几次迭代，流水线才转得起来。
_PROGRAMS_PER_SM, _LEAST_STEPS = 2, 4
_SUM_BLOCK = 1024


def quantized_linear_launch(
    sm: int, out_features: int, in_features: int, dtype: KernelDtype, form: CodeFormat
) -> LaunchTable[KernelSpec]:
    """``dsx::QuantizedLinear`` 的启动表。

    Args:
        sm: 计算能力。
        out_features, in_features: N、K；码是整数的，K 是 ``form.columns`` 的倍数。
        dtype: ``x`` 与 ``y`` 的 dtype。
        form: 码的写法。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 或码不支持。
    """
    sizes = {"N": out_features, "K": in_features}
    problem = coded_problem(QUANTIZED_LINEAR, sm, sizes, ("N", "K"), dtype, form)
    limits = SMS[sm]
    rows = symbol("B") * symbol("S")
    return problem.table([_variant(problem, tile, form, rows, limits.most) for tile in _TILES[limits.shared]])


def _variant(
    problem: Problem, tile: LinearTile, form: CodeFormat, rows: Expression, sms: int
) -> Variant[KernelSpec]:
    N, K = problem.sizes["N"], problem.sizes["K"]
    wide, inner = min(tile.columns, block_size(N)), form.step(min(tile.inner, block_size(K)))
    columns = math.ceil(N / wide)
    splits = 1 if tile.most is None else _splits(columns, math.ceil(K / inner), sms)
    y = problem.port("y") if splits == 1 else scratch("y", "float32", 0)
    row_tiles = rows.ceil(tile.rows)
    product = launch(
        "quantized_linear",
        "quantized_linear",
        (row_tiles * columns, splits, 1),
        (*map(problem.port, ("x", "w", "w_scales")), y, int32("rows", rows), int32("row_tiles", row_tiles)),
        {
            "N": N,
            "K": K,
            "SPLITS": splits,
            "BLOCK_M": tile.rows,
            "GROUP": GROUP,
            **form.constants(),
            "BLOCK_N": wide,
            "BLOCK_K": inner,
        },
        _WARPS,
        tile.num_stages,
    )
    when = Expression.of(1) if tile.most is None else rows.at_most(tile.most)
    if splits == 1:
        return Variant(when, Expression.of(0), (product,))
    total = rows * N
    add = launch(
        "quantized_linear",
        "sum_splits",
        (total.ceil(_SUM_BLOCK), 1, 1),
        (scratch("partial", "float32", 0), problem.port("y"), int32("total", total)),
        {"SPLITS": splits, "BLOCK": _SUM_BLOCK},
        _WARPS,
        1,
    )
    # 行再多也只按这个变体的上限留。
    return Variant(when, rows.min(tile.most or 1) * (splits * N * 4), (product, add))


def _splits(columns: int, steps: int, sms: int) -> int:
    """K 切成几段：程序够分给全部 SM 为止。"""
    wanted = max(1, _PROGRAMS_PER_SM * sms // columns)
    each = max(_LEAST_STEPS, math.ceil(steps / wanted))
    return math.ceil(steps / each)
