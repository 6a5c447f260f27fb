"""``dsx::LatentCacheUpdate`` 的启动表：一个新 token 一个程序。"""

from __future__ import annotations

from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import LaunchTable, Variant
from deepseek_export.kernels.table import (
    KernelDtype,
    KernelSpec,
    Problem,
    block_size,
    check_dtype,
    check_sm,
    int32,
    launch,
    row_width,
)
from deepseek_export.ops.table import LATENT_CACHE_UPDATE

_WARPS = 4


def latent_cache_update_launch(
    sm: int, kv_lora_rank: int, qk_rope_head_dim: int, dtype: KernelDtype
) -> LaunchTable[KernelSpec]:
    """``dsx::LatentCacheUpdate`` 的启动表。

    Args:
        sm: 计算能力。
        kv_lora_rank, qk_rope_head_dim: r、dr。
        dtype: 新的 latent 与旋转部分的 dtype。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 r、dr 太大。
    """
    check_sm(sm)
    check_dtype(LATENT_CACHE_UPDATE, "c_kv", dtype, ("float16", "bfloat16"))
    r, dr = kv_lora_rank, qk_rope_head_dim
    if r > 512 or dr > 64:
        raise DsxError("DSX-E903", f"kv_lora_rank={r}、qk_rope_head_dim={dr}", "kernel 支持到 512 与 64")
    width = row_width(r, dr, "int8")
    problem = Problem(LATENT_CACHE_UPDATE, sm, {"r": r, "dr": dr, "cw": width}, {"T": dtype})
    S, T = symbol("S"), symbol("T")
    update = launch(
        "latent_cache_update",
        "latent_cache_update",
        (symbol("B") * S, 1, 1),
        (*map(problem.port, ("c_kv", "k_pe", "past_lens", "kv_cache_out")), int32("S", S), int32("T", T)),
        {"R": r, "P": dr, "WIDTH": width, "BLOCK_R": block_size(r), "BLOCK_P": block_size(dr)},
        _WARPS,
        1,
    )
    return problem.table([Variant(Expression.of(1), Expression.of(0), (update,))])
