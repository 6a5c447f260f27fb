"""打包导出会写多少字节的权重：只凭配置，不捕获、不改图；``dsx plan`` 与导出前的磁盘预检用的是同一个数。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.int4_codes import with_zeros
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.int4_weights import WEIGHT
from deepseek_export.checkpoint.recipe import (
    Recipe,
    WeightDtype,
    mtp_recipes,
    quantized_recipes,
    weight_recipes,
    zero_points,
)
from deepseek_export.checkpoint.weight_only import KERNEL_SCALE, BlockFormat, Quantization, ScaleDtype
from deepseek_export.plan.shape import PARTS, Part, part_of
from deepseek_export.profile import OptimizationProfile

#: 权重之外的文件（图、tokenizer、报告）至多这么大。
HEADROOM = 64 << 20
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def written_bytes(
    config: ModelConfig,
    profile: OptimizationProfile,
    modules: int,
    dtype: WeightDtype,
    quantization: Quantization | None = None,
    tensorrt: bool = False,
    fp8: Fp8Sources | None = None,
) -> Mapping[Part, int]:
    """各部分的权重写出来多少字节。

    除了量化与存成 int8、bfloat16 的 kv_b，pass 只重排权重，不改变总量。安装的 onnxruntime 缺 kernel 之类的个别拒绝这里看不到，
    导出在改完图之后再按真正的配方核对一次。

    Args:
        config: 模型配置。
        profile: 优化方案。
        modules: 一并导出的 MTP 模块数。
        dtype: 模型 dtype。
        quantization: 只量化权重；``None`` 不量化。与词嵌入共享的 lm_head 与它写法不同，另存一份，算在 ``head``。
        tensorrt: 目标是 TensorRT；量化时、检查点是 FP8 时有区别。
        fp8: 检查点里的 FP8 张量；``None`` 是没有。
    """
    total: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for _, part, nbytes in written_tensors(config, profile, modules, dtype, quantization, tensorrt, fp8):
        total[part] += nbytes
    return total


def written_tensors(
    config: ModelConfig,
    profile: OptimizationProfile,
    modules: int,
    dtype: WeightDtype,
    quantization: Quantization | None = None,
    tensorrt: bool = False,
    fp8: Fp8Sources | None = None,
) -> Iterator[tuple[str, Part, int]]:
    """同 :func:`written_bytes`，一个一个地：名字、在哪一部分、多少字节。"""
    scale = dtype if tensorrt else KERNEL_SCALE
    graphs = [weight_recipes(config, dtype), *(mtp_recipes(config, index, dtype) for index in range(modules))]
    for recipes in graphs:
        own = {} if quantization is None or tensorrt else _own_forms(recipes, profile, quantization)
        stored = fp8 if tensorrt and quantization is None else None
        kept = {} if stored is None else _kept_fp8(recipes, profile, stored)
        for name, recipe in recipes.items():
            part = part_of(name, recipe.shape)
            layout = None if tensorrt else _affine(config, recipe)
            if name in kept:
                yield name, part, kept[name]
            elif quantization is None or part == "small" or (tensorrt and part == "embed"):
                yield name, part, recipe.nbytes
            elif name in own:
                yield name, part, sum(one.nbytes for one in quantized_recipes(recipe, own[name]))
            elif part == "embed":
                yield name, part, recipe.nbytes if quantization.keeps(name) else recipe.nbytes // 2
            elif part == "kv_b" and profile.mla.enabled:
                narrow = not tensorrt and not quantization.keeps(name)
                yield name, part, recipe.nbytes // 2 if narrow else recipe.nbytes
            elif part == "experts" and not tensorrt:
                whole = profile.moe.enabled and _fits_qmoe(name, config, quantization)
                yield name, part, _quantized(recipe, quantization, scale, layout) if whole else recipe.nbytes
            elif quantization.keeps(name) or (tensorrt and recipe.shape[-1] % quantization.block):
                yield name, part, recipe.nbytes  # TensorRT 没有不满的块
            else:
                yield name, part, _quantized(recipe, quantization, scale, layout)
    if config.tie_word_embeddings and quantization is not None:
        embed = graphs[0][_EMBED]
        if not quantization.keeps(_HEAD, _EMBED):
            whole = not tensorrt or config.hidden_size % quantization.block == 0
            yield _HEAD, "head", _quantized(embed, quantization, scale, None) if whole else 0
        elif not tensorrt and not quantization.keeps(_EMBED):
            yield _HEAD, "head", embed.nbytes


def _kept_fp8(recipes: Mapping[str, Recipe], profile: OptimizationProfile, fp8: Fp8Sources) -> dict[str, int]:
    """字节原样留着的 FP8 权重 → 码与 scale 的字节数；吸收进注意力的、没有插件的除外。"""
    wide = {"kv_b": profile.mla.enabled, "experts": not profile.moe.enabled}
    return {
        name: sum(one.nbytes for one in fp8.recipes(recipe))
        for name, recipe in recipes.items()
        if fp8.readable and fp8.holds(recipe) and not wide.get(part_of(name, recipe.shape), False)
    }


def _own_forms(
    recipes: Mapping[str, Recipe], profile: OptimizationProfile, quantization: Quantization
) -> dict[str, BlockFormat]:
    """总是 int8 的：吸收进注意力的 kv_b（一张图里有一个要保留，就都不是）与 int4 的词嵌入；宽度不是 block 的倍数的、要保留的除外。"""
    parts = {name: part_of(name, recipe.shape) for name, recipe in recipes.items()}
    mixed = any(part == "kv_b" and quantization.keeps(name) for name, part in parts.items())
    wanted = {"embed": quantization.kind == "int4", "kv_b": profile.mla.enabled and not mixed}
    form = BlockFormat(kind="int8", block=quantization.block, scale=KERNEL_SCALE)
    return {
        name: form
        for name, part in parts.items()
        if wanted.get(part, False)
        and not quantization.keeps(name)
        and recipes[name].shape[-1] % quantization.block == 0
    }


def _fits_qmoe(name: str, config: ModelConfig, quantization: Quantization) -> bool:
    """一层的三个专家权重要么都换、要么都不换；``QMoE`` 要求两个输入宽度都是 block 的倍数。"""
    prefix = name.rpartition(".experts.")[0]
    kept = quantization.keeps(*(f"{prefix}.experts.*.{kind}_proj.weight" for kind in ("gate", "up", "down")))
    widths = (config.hidden_size, config.moe_intermediate_size)
    return not kept and all(width % quantization.block == 0 for width in widths)


def _quantized(
    recipe: Recipe, quantization: Quantization, scale: ScaleDtype, layout: Int4Layout | None
) -> int:
    """码与 scale，照写的码还有零点；``layout`` 是来源的 4 位怎么排。"""
    form = with_zeros(layout, quantization.format(scale))
    zeros = (zero_points(recipe, form),) if form.zeros else ()
    return sum(part.nbytes for part in (*quantized_recipes(recipe, form), *zeros))


def _affine(config: ModelConfig, recipe: Recipe) -> Int4Layout | None:
    """来源是不是 4 位的，只凭声明；没有说的（GPTQ 不逐个列出）当作是。"""
    int4 = config.int4
    if int4 is None or not recipe.sources or int4.declares(recipe.sources[0].removesuffix(WEIGHT)) is False:
        return None
    return int4.layout
