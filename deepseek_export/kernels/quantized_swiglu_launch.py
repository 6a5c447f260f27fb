"""``dsx::QuantizedMoeExperts`` 的启动表；排序、workspace、加权与 :mod:`.grouped_swiglu_launch` 共用。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from deepseek_export.kernels.codes import CodeFormat, coded_problem
from deepseek_export.kernels.expression import Expression
from deepseek_export.kernels.grouped_swiglu_launch import FEW, GROUP, ExpertsTile, Rows, experts_table
from deepseek_export.kernels.program import Launch, LaunchTable
from deepseek_export.kernels.table import (
    SMS,
    KernelDtype,
    KernelSpec,
    block_size,
    launch,
)
from deepseek_export.ops.table import QUANTIZED_MOE_EXPERTS

#: 共享内存上限 → 各变体的块，行数升序；码只有一两成大，所以比浮点的多留一级。
_TILES: Mapping[int, tuple[ExpertsTile, ...]] = MappingProxyType(
    {
        99 << 10: (ExpertsTile(16, 128, 128, 4, 4), ExpertsTile(64, 128, 64, 4, 3)),
        163 << 10: (ExpertsTile(16, 128, 128, 4, 5), ExpertsTile(64, 128, 64, 4, 4)),
        227 << 10: (ExpertsTile(16, 128, 128, 4, 6), ExpertsTile(64, 128, 64, 4, 5)),
    }
)


def quantized_swiglu_launch(
    sm: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    moe_intermediate_size: int,
    dtype: KernelDtype,
    form: CodeFormat,
) -> LaunchTable[KernelSpec]:
    """``dsx::QuantizedMoeExperts`` 的启动表。

    Args:
        sm: 计算能力。
        num_experts, top_k: E、k。
        hidden_size, moe_intermediate_size: D、I；码是整数的都是 ``form.columns`` 的倍数。
        dtype: ``x`` 与输出的 dtype。
        form: 码的写法。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 或码不支持。
    """
    E, k, D, inner = num_experts, top_k, hidden_size, moe_intermediate_size
    sizes = {"E": E, "k": k, "D": D, "I": inner}
    problem = coded_problem(QUANTIZED_MOE_EXPERTS, sm, sizes, ("D", "I"), dtype, form)

    def matmuls(
        tile: ExpertsTile, rows: Rows
    ) -> tuple[Launch[KernelSpec, Expression], Launch[KernelSpec, Expression]]:
        common = {
            "D": D,
            "INNER": inner,
            "E": E,
            "BLOCK_E": block_size(E),
            "BLOCK_M": tile.rows,
            "FEW": FEW,
            "GROUP": GROUP,
            **form.constants(),
        }
        half = min(tile.columns // 2, block_size(inner))
        full = min(tile.columns, block_size(D))
        weights = ("w_gate", "w_gate_scales", "w_up", "w_up_scales")
        gate_up = launch(
            "quantized_swiglu",
            "quantized_gate_up",
            (rows.tiles * math.ceil(inner / half), 1, 1),
            (problem.port("x"), *map(problem.port, weights), *rows.places, rows.hidden, *rows.counts),
            {"TOP_K": k, **common, "BLOCK_N": half, "BLOCK_K": form.step(min(tile.inner, block_size(D)))},
            tile.num_warps,
            tile.num_stages,
        )
        down = launch(
            "quantized_swiglu",
            "quantized_down",
            (rows.tiles * math.ceil(D / full), 1, 1),
            (
                rows.hidden,
                *map(problem.port, ("w_down", "w_down_scales")),
                *rows.places,
                rows.expert_out,
                *rows.counts,
            ),
            {**common, "BLOCK_N": full, "BLOCK_K": form.step(min(tile.inner, block_size(inner)))},
            tile.num_warps,
            tile.num_stages,
        )
        return gate_up, down

    return experts_table(problem, _TILES[SMS[sm].shared], matmuls)
