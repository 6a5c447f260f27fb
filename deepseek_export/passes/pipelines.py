"""每个目标的流水线：从上到下就是执行次序。"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import onnx
from onnx import helper

from deepseek_export.capture import CapturedModel, ModelDtype
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import (
    DOMAIN,
    INT8_EXPERTS,
    INT8_LINEAR,
    LATENT_ATTENTION,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    OPS,
    SPEC_ACCEPT,
    SPEC_ACCEPT_REJECTION,
)
from deepseek_export.passes.absorb_rope_layout import AbsorbRopeLayoutPass
from deepseek_export.passes.base import MAX_ELEMENTS, GraphModule, Pass, PassResult
from deepseek_export.passes.bound_mla_cache import BoundMlaCachePass
from deepseek_export.passes.fold_reshape_shapes import FoldReshapeShapesPass
from deepseek_export.passes.inline_bodies import (
    InlineMoeGatePass,
    InlineSpecAcceptPass,
    InlineSpecAcceptRejectionPass,
)
from deepseek_export.passes.legality import check_legality
from deepseek_export.passes.lower_experts_to_ort_moe import LowerExpertsToOrtMoePass
from deepseek_export.passes.lower_gate_experts_to_ort_moe import LowerGateExpertsToOrtMoePass
from deepseek_export.passes.lower_mla_to_tensorrt import LowerMlaToTensorrtPass
from deepseek_export.passes.narrow_kv_b_weights import NarrowKvBWeightsPass
from deepseek_export.passes.quantize_linears_to_matmul_nbits import QuantizeLinearsToMatMulNBitsPass
from deepseek_export.passes.quantize_moe_to_qmoe import QuantizeMoeToQMoePass
from deepseek_export.passes.quantize_weights_to_dequantize_linear import (
    QuantizeWeightsToDequantizeLinearPass,
)
from deepseek_export.passes.split_experts import SplitExpertsPass
from deepseek_export.passes.split_pairs import SplitPairsPass
from deepseek_export.passes.use_dense_experts_body import UseDenseExpertsBodyPass
from deepseek_export.passes.wrap_int8_kernels import WrapInt8KernelsPass
from deepseek_export.profile import OptimizationProfile


class Step(NamedTuple):
    """流水线的一项。

    Attributes:
        build: 建立 pass。
        op: 它针对的 dsx 算子；每个这样的节点要么计入 ``count``，要么计入 ``refused``。
        consumes: 改写之后节点是否消失；只改函数体的 pass 为 ``False``。
    """

    build: Callable[[], Pass]
    op: str
    consumes: bool = True


#: 两种 TensorRT 用同一条流水线：差别只在建引擎时（``engine/flavour.py``）。
_TENSORRT = (
    # 缓存写入与吸收用原生层，注意力核留给插件；prefill 用原生融合注意力。
    Step(LowerMlaToTensorrtPass, MLA_ATTENTION.name),
    # MoeExperts 原样留着，它就是插件核；函数体换成 TensorRT 没有插件也建得出的写法。
    Step(UseDenseExpertsBodyPass, MOE_EXPERTS.name, consumes=False),
    # 路由与草稿验证都是原生算子，展开以便层名带着模块路径。
    Step(InlineMoeGatePass, MOE_GATE.name),
    Step(InlineSpecAcceptPass, SPEC_ACCEPT.name),
    Step(InlineSpecAcceptRejectionPass, SPEC_ACCEPT_REJECTION.name),
)

PIPELINES: Mapping[str, Sequence[Step]] = MappingProxyType(
    {
        # 不下沉：每个 dsx 算子走自己的函数体，任何 ONNX 运行时都能跑。
        "portable": (),
        "ort-cpu": (
            # 先试路由与专家一起融合：noaux_tc 的路由也有现成 kernel，不必在图里拼。
            Step(LowerGateExpertsToOrtMoePass, MOE_EXPERTS.name),
            # 剩下的（V2、不归一化、旧 onnxruntime）路由留在函数体里，专家仍用 MoE kernel，省掉 Loop。
            Step(LowerExpertsToOrtMoePass, MOE_EXPERTS.name),
            # 注意力只看用到的缓存前缀：一步的耗时随上下文走，不随缓存容量走。
            Step(BoundMlaCachePass, MLA_ATTENTION.name, consumes=False),
        ),
        "tensorrt": _TENSORRT,
        "tensorrt-rtx": _TENSORRT,
    }
)

#: 只量化权重：在目标的流水线之后再跑的 pass；不在表里的目标不支持。
QUANT_PIPELINES: Mapping[str, Sequence[Callable[[Quantization], Pass]]] = MappingProxyType(
    {
        "ort-cpu": (
            # 权重反正要重写，RoPE 的通道次序顺便排进去；没有量化时不做，检查点里能按引用读的权重还按引用读。
            lambda _: AbsorbRopeLayoutPass(),
            # 专家占 MoE 模型权重的绝大部分；只认下沉好的 MoE，所以排在前面的流水线之后。
            QuantizeMoeToQMoePass,
            # 其余线性层，包括 lm_head 与共享专家。
            QuantizeLinearsToMatMulNBitsPass,
            # 吸收进注意力的 kv_b 不是线性层，每一步却也要整个读一遍。
            NarrowKvBWeightsPass,
            # int8 的换成 dsx 算子：有算子库时走自己的 kernel，没有时函数体就是上面换成的节点。
            lambda _: WrapInt8KernelsPass(),
        ),
        # 线性层与专家一样：TensorRT 自己决定哪些 DequantizeLinear 融进矩阵乘。
        "tensorrt": (QuantizeWeightsToDequantizeLinearPass,),
        "tensorrt-rtx": (QuantizeWeightsToDequantizeLinearPass,),
    }
)

#: 最后收拾的 pass：与算子无关，前面的都做完了才看得出什么用不着。
FINISH: Mapping[str, Sequence[Callable[[], Pass]]] = MappingProxyType(
    {"ort-cpu": (FoldReshapeShapesPass, SplitPairsPass)}
)

#: 产物用来建 TensorRT 引擎的目标。
TENSORRT_TARGETS = ("tensorrt", "tensorrt-rtx")


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


def check_target(target: str, dtype: ModelDtype = "float32") -> None:
    """目标存在吗，支持这种 dtype 吗。

    Raises:
        DsxError: ``DSX-E301`` 没有这个目标；``DSX-E321`` 目标不支持 bfloat16。
    """
    if target not in PIPELINES:
        raise DsxError("DSX-E301", f"目标 {target!r} 不存在", f"可用的目标：{'、'.join(PIPELINES)}")
    if dtype == "bfloat16" and target not in TENSORRT_TARGETS:
        what = f"目标 {target} 在 ONNX Runtime 的 CPU 上运行，它没有 bfloat16 的算子"
        raise DsxError("DSX-E321", what, f"用 --dtype float16，或 --target {' / '.join(TENSORRT_TARGETS)}")


def check_cache(target: str, profile: OptimizationProfile) -> None:
    """这个目标能不能用方案里的缓存 dtype。

    Raises:
        DsxError: ``DSX-E322``，目标不支持 int8 缓存。
    """
    if profile.mla.cache_dtype == "int8" and target in TENSORRT_TARGETS:
        raise DsxError(
            "DSX-E322",
            f"目标 {target} 不支持 mla.cache_dtype=int8：TensorRT 的注意力核只读浮点的缓存",
            "换 --target ort-cpu 或 portable；或 --set mla.cache_dtype=float16",
        )


def check_quantization(target: str, dtype: ModelDtype) -> None:
    """这个目标、这个 dtype 能不能量化权重。

    Raises:
        DsxError: ``DSX-E310`` 目标不支持；``DSX-E311`` dtype 不支持。
    """
    if target not in QUANT_PIPELINES:
        supported = "、".join(QUANT_PIPELINES)
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
) -> LoweredModel:
    """把捕获的模型下沉到一个目标；``captured`` 不变，可以接着下沉到别的目标。

    Args:
        captured: 捕获的结果。
        config, profile, dtype: 捕获时用的那一份。
        target: 编译目标。
        max_elements: 一个权重至多多少个元素，超过的专家权重先拆成几组。
        quantization: 只量化权重；``None`` 不量化。

    Raises:
        DsxError: ``DSX-E301`` 未知的目标；``DSX-E302`` 算子个数与方案不符；``DSX-E303`` 图不合法；``DSX-E310`` /
            ``DSX-E311`` 不能量化；``DSX-E410`` 有权重太大又拆不了。
        PassError: pass 自身的缺陷。
    """
    check_target(target, dtype)
    check_cache(target, profile)
    if quantization is not None:
        check_quantization(target, dtype)
    module = GraphModule.from_captured(captured, config, dtype, profile.mla.form, max_elements)
    check_legality(module, "capture", target)
    _check_captured(module, profile)
    results = _split_oversized(module, target)
    for step in PIPELINES[target]:
        before = len(module.find(step.op))
        rewrite = step.build()
        result = rewrite(module, [earlier.name for earlier in results])
        check_legality(module, rewrite.name, target)
        _check_step(step, result, before, len(module.find(step.op)))
        results.append(result)
    notes = []
    if quantization is not None:
        for build in QUANT_PIPELINES[target]:
            rewrite = build(quantization)
            results.append(rewrite(module, [earlier.name for earlier in results]))
            check_legality(module, rewrite.name, target)
        notes = _float_experts(module, quantization, results)
    for finish in FINISH.get(target, ()):
        rewrite = finish()
        results.append(rewrite(module, [earlier.name for earlier in results]))
        check_legality(module, rewrite.name, target)
    proto = module.to_proto()
    helper.set_model_props(proto, {"dsx.target": target, "dsx.profile": profile.name})
    return LoweredModel(proto, module.weights, results, _fallbacks(results) + notes, module.quantized)


def _split_oversized(module: GraphModule, target: str) -> list[PassResult]:
    """任何目标都先把太大的专家权重拆开；没有太大的就什么也不做、不留记录。"""
    rewrite = SplitExpertsPass()
    result = rewrite(module)
    check_legality(module, rewrite.name, target)
    for name, recipe in module.weights.items():
        if (size := math.prod(recipe.shape)) > module.max_elements:
            raise DsxError(
                "DSX-E410",
                f"{name} 有 {size} 个元素，一个张量至多 {module.max_elements} 个",
                "打开 moe（例如 -p mla+moe），专家权重就能按组拆开；其余权重 dsx 拆不了",
            )
    return [result] if result.changed else []


def _check_captured(module: GraphModule, profile: OptimizationProfile) -> None:
    """捕获之后：打开 MLA 则每层一个 MlaAttention，打开 MoE 则每个 MoE 层一对 MoeGate / MoeExperts；打开 MTP 的主模型另有一个
    草稿验证。
    """
    moe = sum(map(module.config.is_moe_layer, module.layers)) if profile.moe.enabled else 0
    main_mtp = module.role == "main" and profile.mtp.enabled
    expected = {
        MLA_ATTENTION.name: len(module.layers) if profile.mla.enabled else 0,
        **dict.fromkeys((LATENT_ATTENTION.name, INT8_LINEAR.name, INT8_EXPERTS.name), 0),  # 只由下沉产生
        MOE_GATE.name: moe,
        MOE_EXPERTS.name: moe,
        SPEC_ACCEPT.name: int(main_mtp and profile.mtp.verify == "greedy"),
        SPEC_ACCEPT_REJECTION.name: int(main_mtp and profile.mtp.verify == "rejection"),
    }
    for op in OPS:
        if (got := len(module.find(op))) != expected[op]:
            what = f"capture 之后有 {got} 个 {DOMAIN}::{op}，方案 {profile.name} 应有 {expected[op]} 个"
            raise DsxError("DSX-E302", what, "核对传给 lower 的配置、方案是否就是捕获时用的那一份")


def _check_step(step: Step, result: PassResult, before: int, after: int) -> None:
    """pass 之后：处理的加拒绝的等于之前的；剩下的等于拒绝的，只改函数体的则一个不少。"""
    refused = len(result.refused)
    left = refused if step.consumes else before
    if result.count + refused != before or after != left:
        what = (
            f"pass {result.name} 报告改写 {result.count} 处、拒绝 {refused} 处，"
            f"而 {DOMAIN}::{step.op} 从 {before} 个变成 {after} 个"
        )
        raise DsxError(
            "DSX-E302", what, f"这是 dsx 的缺陷，出在 {result.name}：请附上这段文字和 pip list 报告"
        )


def _float_experts(
    module: GraphModule, quantization: Quantization, results: Sequence[PassResult]
) -> list[str]:
    """没有下沉成 ``MoE`` 的专家不在量化 pass 的视野里，不能不说。"""
    seen = {refusal.node.partition("/")[0] for result in results for refusal in result.refused}
    left = [
        name
        for name, recipe in module.weights.items()
        if recipe.op == "stack" and not quantization.keeps(name)
        if not any(name.startswith(f"model.{path}.") for path in seen)
    ]
    if not left:
        return []
    why = "它们没有下沉成 MoE 节点（moe.enabled=false，或下沉被拒绝）"
    return [f"{len(left)} 个专家权重没有量化：{why}，例如 {left[0]}"]


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
    return lines
