"""配方补上只有文件头才知道的事：来源是 FP8、还是 4 位。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deepseek_export.checkpoint.checkpoint import Checkpoint
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.int4_tensors import is_int4
from deepseek_export.checkpoint.int4_weights import in_order
from deepseek_export.checkpoint.quantization import FP8_DTYPE
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.errors import DsxError


def bind_recipes(recipes: Mapping[str, Recipe], checkpoint: Checkpoint) -> dict[str, Recipe]:
    """来源是 FP8、要还原的配方写明块大小，是 4 位的写明怎么排。

    Args:
        recipes: 由配置得出的配方。
        checkpoint: 已核对的检查点。

    Raises:
        DsxError: ``DSX-E120`` / ``DSX-E651``，叠在一起的来源有的是 FP8、4 位，有的不是。
    """
    config, store = checkpoint.config, checkpoint.store
    if config.weight_block_size is not None:
        stored: dict[str, Any] = {"block_size": config.weight_block_size}
        return _bound(
            recipes, lambda source: store[source].dtype == FP8_DTYPE, lambda _: stored, "DSX-E120", "FP8"
        )
    if config.int4 is not None:
        layout = config.int4.layout
        return _bound(
            recipes,
            lambda source: is_int4(source, layout, store),
            lambda recipe: {"int4": _known_order(recipe, layout, checkpoint)},
            "DSX-E651",
            "4 位",
        )
    return dict(recipes)


def int4_layout(checkpoint: Checkpoint, recipe: Recipe) -> Int4Layout | None:
    """一个浮点权重在检查点里怎么排；不是 4 位的为 ``None``。错误同 :func:`bind_recipes`。"""
    return bind_recipes({"": recipe}, checkpoint)[""].int4


def _bound(
    recipes: Mapping[str, Recipe],
    special: Callable[[str], bool],
    stored: Callable[[Recipe], dict[str, Any]],
    code: str,
    what: str,
) -> dict[str, Recipe]:
    bound = {}
    for name, recipe in recipes.items():
        kinds = {special(source) for source in recipe.sources}
        if len(kinds) > 1:
            odd = next(source for source in recipe.sources if not special(source))
            raise DsxError(
                code,
                f"{name} 的来源有的是 {what}、有的不是：{odd} 不是",
                f"同一层的专家要么全是 {what}、要么都不是；重新下载或重新转换检查点",
            )
        widened = True in kinds and not recipe.keeps_bytes
        bound[name] = _updated(recipe, stored(recipe)) if widened else recipe
    return bound


def _known_order(recipe: Recipe, layout: Int4Layout, checkpoint: Checkpoint) -> Int4Layout:
    """声明了次序任意的，读一遍 ``g_idx``：其实依次排列的就按依次排列的读。"""
    if layout.act_order and all(in_order(source, layout, checkpoint.store) for source in recipe.sources):
        return replace(layout, act_order=False)
    return layout


def _updated(recipe: Recipe, stored: dict[str, Any]) -> Recipe:
    """``codes``、``scales`` 自己不读来源，写在量化之前的那个配方上。"""
    if recipe.of is not None:
        return recipe.model_copy(update={"of": _updated(recipe.of, stored)})
    return recipe.model_copy(update=stored)
