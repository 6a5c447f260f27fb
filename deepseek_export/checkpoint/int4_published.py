"""照检查点发布的样子量化：4 位的照原来的码，其余保持浮点。"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.checkpoint import Checkpoint, require_mtp
from deepseek_export.checkpoint.int4_codes import keeps_codes, with_zeros
from deepseek_export.checkpoint.recipe import Recipe, mtp_recipes, weight_recipes
from deepseek_export.checkpoint.weight_only import QuantBlock, Quantization
from deepseek_export.errors import DsxError
from deepseek_export.profile import OptimizationProfile

#: ``--quant`` 的这个值、``quantization`` 的这个值，就是这里的意思。
AS_PUBLISHED: Literal["checkpoint"] = "checkpoint"


def as_published(
    quantization: Quantization | Literal["checkpoint"] | None,
    path: Path | str,
    profile: OptimizationProfile,
    affine: bool,
) -> Quantization | None:
    """``"checkpoint"`` 换成由检查点得出的，其余原样。

    Args:
        quantization: 用户要的。
        path: 检查点目录。
        profile: 方案，决定要不要 MTP 层。
        affine: 见 :func:`published_quantization`。

    Raises:
        DsxError: 见 :func:`published_quantization`；1xx 检查点。
    """
    if quantization != AS_PUBLISHED:
        return quantization
    checkpoint = Checkpoint.open(path)
    return published_quantization(checkpoint, require_mtp(checkpoint) if profile.mtp.enabled else 0, affine)


def published_quantization(checkpoint: Checkpoint, modules: int, affine: bool) -> Quantization:
    """由检查点得出怎么量化。

    是 int4；有零点而目标的 int4 放不下零点的是 int8（见 :mod:`~deepseek_export.checkpoint.int4_codes`）。块就是检查点的组；检查点里不是 4 位的
    都在 ``keep`` 里。

    Args:
        checkpoint: 已核对的检查点。
        modules: 要用几个 MTP 模块。
        affine: 目标的 int4 放得下零点。

    Raises:
        DsxError: ``DSX-E653``，检查点不是 4 位的，或组的次序任意，照原来的码写不出来；其余见 ``bind_recipes``。
    """
    config = checkpoint.config
    if config.int4 is None:
        raise DsxError(
            "DSX-E653",
            f"{checkpoint.path} 不是 4 位的检查点，没有可以照搬的码",
            "用 --quant int8 或 int4 量化，或去掉 --quant",
        )
    layout = config.int4.layout
    kind: Literal["int8", "int4"] = "int4" if layout.symmetric or affine else "int8"
    recipes = weight_recipes(config, "float16")
    for index in range(modules):
        recipes |= mtp_recipes(config, index, "float16")
    bound = bind_recipes(recipes, checkpoint)
    quantization = Quantization(kind=kind, block=cast(QuantBlock, layout.group), keep=tuple(_floating(bound)))
    form = quantization.format("float16")
    for name, recipe in bound.items():
        if recipe.int4 is not None and not keeps_codes(recipe.int4, with_zeros(recipe.int4, form)):
            raise DsxError(
                "DSX-E653",
                f"{name} 的组次序任意（act-order，g_idx 不是依次排列的），照原来的码写不出来",
                "去掉 --quant，还原成浮点（精确）；或用 --quant int8、int4 重新量化",
            )
    return quantization


def int4_notes(recipes: Mapping[str, Recipe]) -> list[str]:
    """写出来的配方里，来源是 4 位、而没有照原来的码的，各说一行；照原来的码的不必说。"""
    widened = [name for name, recipe in recipes.items() if recipe.int4 is not None]
    changed = [name for name, recipe in recipes.items() if _requantised(recipe)]
    lines = []
    if widened:
        lines.append(
            f"{len(widened)} 个权重在检查点里是 4 位，还原成了浮点，例如 {widened[0]}；--quant checkpoint 照原来的码"
        )
    if changed:
        lines.append(
            f"{len(changed)} 个权重在检查点里是 4 位，重新量化了，例如 {changed[0]}：块除不尽检查点的组、有零点而目标的 int4 放不下，或组的次序任意"
        )
    return lines


def _requantised(recipe: Recipe) -> bool:
    before, form = recipe.of, recipe.form
    if recipe.op == "scales" or before is None or form is None or before.int4 is None:
        return False
    return not keeps_codes(before.int4, form)


def _floating(recipes: Mapping[str, Recipe]) -> list[str]:
    """``keep``：恰好匹配到不是 4 位的权重，写得尽量短。"""
    # 总是 float32 的（router）不必写。
    matrices = {name: r for name, r in recipes.items() if len(r.shape) > 1 and r.dtype != "float32"}
    packed = [name for name, recipe in matrices.items() if recipe.int4 is not None]
    taken = {segment for name in packed for segment in name.split(".")}
    kept: dict[str, None] = {}
    for name, recipe in matrices.items():
        if recipe.int4 is not None:
            continue
        own = [one for one in name.split(".") if one not in taken]
        kept[_shortest(name, own, packed)] = None
    return list(kept)


def _shortest(name: str, own: list[str], packed: list[str]) -> str:
    """``name`` 里哪一段只有不是 4 位的才有；一段不够，就写成整个名字。"""
    words = [one for one in own if not one.isdigit()]
    if words:
        return words[0]
    layer = ".".join(name.split(".")[:3])
    if name.startswith("model.layers.") and not any(f".{layer}." in f".{one}." for one in packed):
        return layer.removeprefix("model.")
    return name.removesuffix(".weight")
