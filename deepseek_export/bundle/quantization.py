"""导出时的量化：``--keep`` 写得对不对，每个量化了的权重偏了多少。"""

from __future__ import annotations

from typing import Any

from deepseek_export.bundle.calibrated import WeightSource
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.int4_codes import keeps_codes
from deepseek_export.checkpoint.recipe import mtp_recipes, weight_recipes
from deepseek_export.checkpoint.restored import quantization_error
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress

_MOST_SENSITIVE = 5


def check_keep(quantization: Quantization, config: ModelConfig, modules: int) -> None:
    """``--keep`` 的每一项都匹配到什么。

    Args:
        quantization: 这次导出的量化。
        config: 模型。
        modules: 导出几个 MTP 模块。

    Raises:
        DsxError: ``DSX-E312``。
    """
    names = [*weight_recipes(config, "float32"), "lm_head"]
    for index in range(modules):
        names += mtp_recipes(config, index, "float32")
    if unmatched := quantization.unmatched(names):
        raise DsxError(
            "DSX-E312",
            f"--keep 的 {unmatched[0]!r} 什么也没有匹配到",
            "按点分的整段写，例如 lm_head、o_proj、layers.0、layers.3.mlp；叠在一起的专家写成 mlp.experts",
        )


def quantization_report(weights: WeightSource, progress: Progress) -> dict[str, Any]:
    """每个量化了的权重偏了多少，最敏感（相对误差最大）的几个点名；照检查点的 4 位码写的，一位不差的有几个，scale 舍入了的是哪些。"""
    codes = {name: recipe for name, recipe in weights.recipes.items() if recipe.op in ("codes", "rows")}
    progress.start("量化误差", len(codes))
    errors = {}
    for name, recipe in codes.items():
        errors[name] = quantization_error(name, recipe, weights.store)
        progress.advance(1, name)
    published = {
        name: not errors[name].max_abs
        for name, recipe in codes.items()
        if recipe.of is not None and recipe.form is not None and keeps_codes(recipe.of.int4, recipe.form)
    }
    rounded = [name for name, exact in published.items() if not exact]
    if rounded:
        progress.note(
            f"{len(rounded)} 个 4 位权重的 scale 放不进目标的 dtype，舍入了，例如 {rounded[0]}；码照旧"
        )
    ranked = sorted(errors, key=lambda name: errors[name].relative, reverse=True)
    return {
        "most_sensitive": ranked[:_MOST_SENSITIVE],
        "published": {"exact": len(published) - len(rounded), "rounded": rounded},
        "tensors": {name: errors[name].model_dump() for name in ranked},
    }
