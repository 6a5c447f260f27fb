"""把捕获的模型下沉到一个目标：按流水线一步一步地跑，跑之前核对目标、缓存与量化合不合。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from deepseek_export.capture import CapturedModel
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError, did_you_mean
from deepseek_export.ops.table import (
    DOMAIN,
    LIGHTNING_INDEXER,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    OPS,
    SPARSE_MLA_ATTENTION,
    SPEC_ACCEPT,
    SPEC_ACCEPT_REJECTION,
)
from deepseek_export.passes.base import MAX_ELEMENTS, GraphModule
from deepseek_export.passes.legality import check_legality
from deepseek_export.passes.pipelines import pipeline
from deepseek_export.profile import OptimizationProfile
from deepseek_export.records import QUANT_TARGETS, TARGETS, TENSORRT_TARGETS, ModelDtype, PassResult

_UNLIMITED = 1 << 62


@dataclass
class LoweredModel:
    """下沉的结果。

    Attributes:
        proto: 整个模型，带用得到的函数体；权重仍是输入，排在 I/O 契约的输入之后。
        weights: 权重输入名 → 配方，与 ``proto`` 的权重输入一一对应、次序相同。
        results: 每个 pass 的报告，按执行次序。
        fallbacks: 没有改写的地方，同一原因一行，供打印和写进 manifest。
        quantized: 见 :class:`~deepseek_export.passes.base.GraphModule`。
    """

    proto: onnx.ModelProto
    weights: dict[str, Recipe]
    results: list[PassResult]
    fallbacks: list[str]
    quantized: set[str]


def check_target(target: str, dtype: ModelDtype) -> None:
    """目标存在吗，支持这种 dtype 吗。

    Raises:
        DsxError: ``DSX-E301`` 没有这个目标；``DSX-E321`` 目标不支持 bfloat16。
    """
    if target not in TARGETS:
        todo = f"{did_you_mean(target, TARGETS)}可用的目标：{'、'.join(TARGETS)}"
        raise DsxError("DSX-E301", f"目标 {target!r} 不存在", todo)
    if dtype == "bfloat16" and target not in TENSORRT_TARGETS:
        what = f"目标 {target} 在 ONNX Runtime 的 CPU 上运行，它没有 bfloat16 的算子"
        raise DsxError("DSX-E321", what, f"用 --dtype float16，或 --target {' / '.join(TENSORRT_TARGETS)}")


def check_cache(target: str, profile: OptimizationProfile, sparse: bool) -> None:
    """这个目标能不能用方案里的缓存 dtype；``sparse`` 是模型有没有稀疏注意力。

    Raises:
        DsxError: ``DSX-E322``，目标不支持 int8 缓存。
    """
    if profile.dsa.index_cache_dtype == "int8" and target in TENSORRT_TARGETS:
        raise DsxError(
            "DSX-E322",
            f"目标 {target} 不支持 dsa.index_cache_dtype=int8：TensorRT 的索引器只读浮点的缓存",
            "换 --target ort-cpu 或 portable；或去掉 dsa.index_cache_dtype",
        )
    if profile.mla.cache_dtype == "int8" and sparse and target in TENSORRT_TARGETS:
        raise DsxError(
            "DSX-E322",
            f"目标 {target} 不支持稀疏注意力的 mla.cache_dtype=int8：TensorRT 的稀疏注意力核只读浮点的缓存",
            "换 --target ort-cpu 或 portable；或 --set mla.cache_dtype=float16",
        )


def check_quantization(target: str, dtype: ModelDtype) -> None:
    """这个目标、这个 dtype 能不能量化权重。

    Raises:
        DsxError: ``DSX-E310`` 目标不支持；``DSX-E311`` dtype 不支持。
    """
    if target not in QUANT_TARGETS:
        supported = "、".join(QUANT_TARGETS)
        raise DsxError(
            "DSX-E310", f"目标 {target} 不支持 --quant", f"可以量化的目标：{supported}；或去掉 --quant"
        )
    if target == "ort-cpu" and dtype != "float32":
        raise DsxError(
            "DSX-E311",
            f"目标 {target} 的 --quant 与 --dtype {dtype} 不能同时用",
            "用 --dtype float32：码之外的计算保持 float32",
        )


def lower(
    captured: CapturedModel,
    config: ModelConfig,
    profile: OptimizationProfile,
    dtype: ModelDtype,
    target: str,
    max_elements: int = MAX_ELEMENTS,
    quantization: Quantization | None = None,
    fp8: Fp8Sources | None = None,
    int4: Callable[[Recipe], Int4Layout | None] | None = None,
) -> LoweredModel:
    """把捕获的模型下沉到一个目标；``captured`` 不变，可以接着下沉到别的目标。

    Args:
        captured: 捕获的结果。
        config, profile, dtype: 捕获时用的那一份。
        target: 编译目标。
        max_elements: 一个浮点权重至多多少个元素，超过的专家权重先拆成几组；``ort-cpu`` 上换成码的不拆。
        quantization: 只量化权重；``None`` 不量化。
        fp8: 检查点里的 FP8 张量，见 :func:`pipeline`。
        int4: 一个浮点权重在检查点里是不是 4 位的、怎么排；``None`` 是都不是。

    Raises:
        DsxError: ``DSX-E301`` 未知的目标；``DSX-E302`` 算子个数与方案不符；``DSX-E303`` 图不合法；``DSX-E310`` /
            ``DSX-E311`` 不能量化；``DSX-E410`` 有权重太大又拆不了。
        PassError: pass 自身的缺陷。
    """
    check_target(target, dtype)
    check_cache(target, profile, config.indexer is not None)
    if quantization is not None:
        check_quantization(target, dtype)

    def run(limit: int) -> LoweredModel:
        module = GraphModule.from_captured(captured, config, dtype, profile.mla.form, limit)
        module.int4 = int4 or module.int4
        check_legality(module, "capture", target)
        _check_captured(module, profile)
        results: list[PassResult] = []
        for step in pipeline(target, quantization, bool(module.oversized()), fp8):
            results.append(step.run(module, target, [earlier.name for earlier in results]))
        proto = module.to_proto()
        helper.set_model_props(proto, {"dsx.target": target, "dsx.profile": profile.name})
        return LoweredModel(proto, module.weights, results, _fallbacks(results), module.quantized)

    if target == "ort-cpu" and quantization is not None:
        # 拆成几组的专家换不成码。码由 kernel 按 64 位的下标读，多大都行：先不拆，还剩装不下的浮点权重才从头拆开。
        whole = run(_UNLIMITED)
        if not any(_large(recipe, max_elements) for recipe in whole.weights.values()):
            return whole
    return run(max_elements)


def _large(recipe: Recipe, max_elements: int) -> bool:
    """装不下的浮点权重。"""
    return recipe.of is None and math.prod(recipe.shape) > max_elements


def _check_captured(module: GraphModule, profile: OptimizationProfile) -> None:
    """捕获之后：打开 MLA 则每层一个 MlaAttention（稀疏注意力的是 SparseMlaAttention），自己挑 key 的层一个 LightningIndexer，打开 MoE 则每个 MoE 层一对 MoeGate / MoeExperts；打开 MTP 的主模型另有一个
    草稿验证。
    """
    moe = sum(map(module.config.is_moe_layer, module.layers)) if profile.moe.enabled else 0
    main_mtp = module.role == "main" and profile.mtp.enabled
    latent, sparse = len(module.layers) if profile.mla.enabled else 0, module.config.indexer is not None
    expected = {
        MLA_ATTENTION.name: 0 if sparse else latent,
        SPARSE_MLA_ATTENTION.name: latent if sparse else 0,
        LIGHTNING_INDEXER.name: sum(map(module.config.runs_indexer, module.layers)),
        MOE_GATE.name: moe,
        MOE_EXPERTS.name: moe,
        SPEC_ACCEPT.name: int(main_mtp and profile.mtp.verify == "greedy"),
        SPEC_ACCEPT_REJECTION.name: int(main_mtp and profile.mtp.verify == "rejection"),
    }
    for op in OPS:
        wanted = expected.get(op, 0)  # 其余的只由下沉产生
        if (got := len(module.find(op))) != wanted:
            what = f"capture 之后有 {got} 个 {DOMAIN}::{op}，方案 {profile.name} 应有 {wanted} 个"
            raise DsxError("DSX-E302", what, "核对传给 lower 的配置、方案是否就是捕获时用的那一份")


def _fallbacks(results: Sequence[PassResult]) -> list[str]:
    # 几十层因同一个原因被拒绝，只说一次；逐处的值在 results 里。
    grouped: dict[str, tuple[dict[str, None], dict[str, str]]] = {}
    for result in results:
        for refusal in result.refused:
            passes, values = grouped.setdefault(refusal.reason, ({}, {}))
            passes[result.name] = None
            values.setdefault(refusal.node, refusal.value)
    lines = []
    for reason, (passes, values) in grouped.items():
        node, value = next(iter(values.items()))
        where = node.rpartition("/")[0] + (f" 等 {len(values)} 处" if len(values) > 1 else "")
        lines.append(f"{'、'.join(passes)} 没有改写 {where}：{reason}（{value}）")
    return lines + [note for result in results for note in result.notes]
