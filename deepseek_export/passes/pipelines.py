"""每个目标的流水线：从上到下就是执行次序。"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

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
from deepseek_export.passes.absorb_rope_layout import AbsorbRopeLayoutPass
from deepseek_export.passes.base import MAX_ELEMENTS, MICROSOFT, GraphModule, Pass
from deepseek_export.passes.bound_mla_cache import BoundMlaCachePass
from deepseek_export.passes.fold_reshape_shapes import FoldReshapeShapesPass
from deepseek_export.passes.fuse_quantized_experts import FuseQuantizedExpertsPass
from deepseek_export.passes.fuse_quantized_linears import FuseQuantizedLinearsPass, int8_linears
from deepseek_export.passes.inline_bodies import (
    InlineMoeGatePass,
    InlineSpecAcceptPass,
    InlineSpecAcceptRejectionPass,
)
from deepseek_export.passes.keep_fp8_weights import KeepFp8WeightsPass, fp8_weights
from deepseek_export.passes.legality import check_legality
from deepseek_export.passes.lower_experts_to_ort_moe import LowerExpertsToOrtMoePass
from deepseek_export.passes.lower_gate_experts_to_ort_moe import LowerGateExpertsToOrtMoePass
from deepseek_export.passes.lower_indexer_to_tensorrt import LowerIndexerToTensorrtPass
from deepseek_export.passes.lower_mla_to_tensorrt import LowerMlaToTensorrtPass
from deepseek_export.passes.narrow_kv_b_weights import NarrowKvBWeightsPass
from deepseek_export.passes.quantize_embedding import QuantizeEmbeddingPass, embeddings
from deepseek_export.passes.quantize_kv_b_weights import QuantizeKvBWeightsPass, float_kv_b
from deepseek_export.passes.quantize_linears_to_matmul_nbits import QuantizeLinearsToMatMulNBitsPass
from deepseek_export.passes.quantize_moe_to_qmoe import QuantizeMoeToQMoePass
from deepseek_export.passes.quantize_weights_to_dequantize_linear import (
    QuantizeWeightsToDequantizeLinearPass,
)
from deepseek_export.passes.skip_index_queries import SkipIndexQueriesPass
from deepseek_export.passes.split_experts import SplitExpertsPass
from deepseek_export.passes.split_pairs import SplitPairsPass
from deepseek_export.passes.use_dense_experts_body import UseDenseExpertsBodyPass
from deepseek_export.passes.wrap_quant_kernels import WrapQuantKernelsPass
from deepseek_export.profile import OptimizationProfile
from deepseek_export.records import QUANT_TARGETS, TARGETS, TENSORRT_TARGETS, ModelDtype, PassResult

_UNLIMITED = 1 << 62
#: 图 → 个数。
Count = Callable[[GraphModule], int]


@dataclass(frozen=True)
class Step:
    """流水线的一项：一个 pass，与它应当处理几处。

    Attributes:
        rewrite: pass；没有改写的由它自己报告（``refused``、``kept``、``notes``）。
        expected: 跑之前的图 → 几处；改写、拒绝、保留的加起来必须正好这么多。``None`` 不核对，写明为什么。
        consumes: 改写之后 ``expected`` 数的东西是否消失：再数一遍，``True`` 剩下的是拒绝的与保留的，``False`` 一个不少。
    """

    rewrite: Pass
    expected: Count | None
    consumes: bool = True

    def run(self, module: GraphModule, target: str, before: Sequence[str]) -> PassResult:
        """跑 pass，查合法性，核对个数。

        Raises:
            DsxError: ``DSX-E302`` 个数不符；``DSX-E303`` 图不合法；pass 抛出的用户错误。
            PassError: pass 自身的缺陷。
        """
        wanted = self.expected(module) if self.expected else 0
        result = self.rewrite(module, before)
        check_legality(module, result.name, target)
        if self.expected:
            left, after = len(result.refused) + result.kept, self.expected(module)
            if result.count + left != wanted or after != (left if self.consumes else wanted):
                what = (
                    f"pass {result.name} 报告改写 {result.count} 处、拒绝 {len(result.refused)} 处、保留 {result.kept} 处，"
                    f"而应处理的有 {wanted} 处，之后还有 {after} 处"
                )
                todo = f"这是 dsx 的缺陷，出在 {result.name}：请附上这段文字和 pip list 报告"
                raise DsxError("DSX-E302", what, todo)
        return result


def _portable(quantization: Quantization | None, oversized: bool, fp8: Fp8Sources | None) -> Iterator[Step]:
    # 不下沉：每个 dsx 算子走自己的函数体，任何 ONNX 运行时都能跑。
    if oversized:
        # 太大的专家权重没有运行时装得下。
        yield Step(SplitExpertsPass(), oversized_experts)
    # 名额够的一步不打分，只为打分的投影也不算。
    yield Step(SkipIndexQueriesPass("capacity"), nodes(LIGHTNING_INDEXER.name), consumes=False)


def _ort_cpu(quantization: Quantization | None, oversized: bool, fp8: Fp8Sources | None) -> Iterator[Step]:
    if oversized:
        # 太大的专家权重没有运行时装得下；下沉时要知道哪些拆过，所以排在最前。
        yield Step(SplitExpertsPass(), oversized_experts)
    # 先试路由与专家一起融合：noaux_tc 的路由也有现成 kernel，不必在图里拼。
    yield Step(LowerGateExpertsToOrtMoePass(), nodes(MOE_EXPERTS.name))
    # 剩下的（V2、不归一化、旧 onnxruntime）路由留在函数体里，专家仍用 MoE kernel，省掉 Loop。
    yield Step(LowerExpertsToOrtMoePass(), nodes(MOE_EXPERTS.name))
    # 注意力只看用到的缓存前缀：一步的耗时随上下文走，不随缓存容量走。
    yield Step(
        BoundMlaCachePass(),
        nodes(MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name, LIGHTNING_INDEXER.name),
        consumes=False,
    )
    if quantization is not None:
        # 权重反正要重写，RoPE 的通道次序顺便排进去；没有量化时不做，检查点里能按引用读的权重还按引用读。
        yield Step(AbsorbRopeLayoutPass(), absorbable_ropes, consumes=False)
        # 专家占 MoE 模型权重的绝大部分；只认下沉好的 MoE，所以排在下沉之后。
        yield Step(QuantizeMoeToQMoePass(quantization), nodes("MoE", domain=MICROSOFT))
        # 其余线性层，包括 lm_head 与共享专家。
        yield Step(QuantizeLinearsToMatMulNBitsPass(quantization), linear_layers, consumes=False)
        # 吸收进注意力的 kv_b 不是线性层，每一步却也要整个读一遍。
        yield Step(QuantizeKvBWeightsPass(quantization), lambda module: len(float_kv_b(module)))
        # 存不成 int8 的，至少减半。
        yield Step(NarrowKvBWeightsPass(quantization), lambda module: len(float_kv_b(module)))
        # 词嵌入每步只取几行，大的是文件。
        yield Step(QuantizeEmbeddingPass(quantization), lambda module: len(embeddings(module)))
        # 换成 dsx 算子：有算子库时走自己的 kernel，没有时函数体就是上面换成的节点。
        yield Step(WrapQuantKernelsPass(), nodes("MatMulNBits", "QMoE", domain=MICROSOFT))
    # 形状在编译时定下来；前面的都做完了才看得出什么用不着。几处取决于追踪器怎么写，没有数可以核对。
    yield Step(FoldReshapeShapesPass(), None)
    # 没有排进权重的 RoPE 重排，换成快的写法。
    yield Step(SplitPairsPass(), paired_ropes if quantization is None else biased_ropes, consumes=False)
    # 名额够的一步不打分，只为打分的投影也不算；前面的 pass 按节点的样子认，所以排在最后。
    yield Step(SkipIndexQueriesPass("length"), nodes(LIGHTNING_INDEXER.name), consumes=False)


def _tensorrt(quantization: Quantization | None, oversized: bool, fp8: Fp8Sources | None) -> Iterator[Step]:
    # 两种 TensorRT 用同一条流水线：差别只在建引擎时（``engine/flavour.py``）。
    if oversized:
        # TensorRT 的张量至多 2^31-1 个元素。
        yield Step(SplitExpertsPass(), oversized_experts)
    # 索引缓存的写入用原生层，打分与挑选留给插件。
    yield Step(LowerIndexerToTensorrtPass(), nodes(LIGHTNING_INDEXER.name))
    # 缓存写入与吸收用原生层，注意力核留给插件；prefill 用原生融合注意力。
    yield Step(LowerMlaToTensorrtPass(), nodes(MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name))
    # MoeExperts 原样留着，它就是插件核；函数体换成 TensorRT 没有插件也建得出的写法。
    yield Step(UseDenseExpertsBodyPass(), nodes(MOE_EXPERTS.name), consumes=False)
    # 路由与草稿验证都是原生算子，展开以便层名带着模块路径。
    yield Step(InlineMoeGatePass(), nodes(MOE_GATE.name))
    yield Step(InlineSpecAcceptPass(), nodes(SPEC_ACCEPT.name))
    yield Step(InlineSpecAcceptRejectionPass(), nodes(SPEC_ACCEPT_REJECTION.name))
    if quantization is not None:
        # 线性层与专家一样：TensorRT 自己决定哪些 DequantizeLinear 融进矩阵乘。
        yield Step(QuantizeWeightsToDequantizeLinearPass(quantization), linears_and_experts, consumes=False)
        # 专家的还原融不进插件，换成自己读码的插件核。
        yield Step(FuseQuantizedExpertsPass(), nodes(MOE_EXPERTS.name))
        # int8 的线性层同样：还原是单独一层，每步把整个权重写一遍、再读一遍。
        yield Step(FuseQuantizedLinearsPass(), lambda module: len(int8_linears(module)))
    elif fp8 is not None:
        # 来源是 FP8 的，字节原样留着；另要量化的就不留：一张图里只有一种码。
        yield Step(KeepFp8WeightsPass(fp8), lambda module: len(fp8_weights(module, fp8)))


_Pipeline: TypeAlias = Callable[[Quantization | None, bool, Fp8Sources | None], Iterator[Step]]
_PIPELINES: Mapping[str, _Pipeline] = MappingProxyType(
    {"portable": _portable, "ort-cpu": _ort_cpu, "tensorrt": _tensorrt, "tensorrt-rtx": _tensorrt}
)


def pipeline(
    target: str,
    quantization: Quantization | None = None,
    oversized: bool = False,
    fp8: Fp8Sources | None = None,
) -> list[Step]:
    """一个目标的流水线，从上到下就是执行次序。

    Args:
        target: 编译目标，先过 :func:`check_target`。
        quantization: 只量化权重；``None`` 不量化。先过 :func:`check_quantization`。
        oversized: 有没有一个张量装不下的权重。
        fp8: 检查点里的 FP8 张量；``None`` 是没有。只有 TensorRT 的目标把它们原样留着。
    """
    return list(_PIPELINES[target](quantization, oversized, fp8))


def nodes(*ops: str, domain: str = DOMAIN) -> Count:
    """这几种节点的个数；捕获之后每个 dsx 算子有几个已按方案核对过。"""
    return lambda module: sum(len(module.find(op, domain)) for op in ops)


def oversized_experts(module: GraphModule) -> int:
    """有权重太大的 ``MoeExperts``。"""
    large = set(module.oversized())
    return sum(any(t.name in large for t in node.inputs) for node in module.find(MOE_EXPERTS.name))


def paired_ropes(module: GraphModule) -> int:
    """要把成对的通道改成前后两半的 RoPE。"""
    return _main_ropes(module) + _index_ropes(module)


def biased_ropes(module: GraphModule) -> int:
    """其中重排排不进权重的：线性层带 bias 的每层的 k_pe；索引器的，它们旋转的是前一段。"""
    return (_main_ropes(module) // 2 if module.config.attention_bias else 0) + _index_ropes(module)


def absorbable_ropes(module: GraphModule) -> int:
    """其余的。"""
    return paired_ropes(module) - biased_ropes(module)


def _main_ropes(module: GraphModule) -> int:
    """每层的 q_pe 与 k_pe。"""
    return 2 * len(module.layers) if module.config.rope_layout == "deinterleaved" else 0


def _index_ropes(module: GraphModule) -> int:
    """每个索引器的 q 与 k。"""
    indexer = module.config.indexer
    paired = indexer is not None and indexer.rope_layout == "deinterleaved"
    return 2 * sum(map(module.config.runs_indexer, module.layers)) if paired else 0


def linear_layers(module: GraphModule) -> int:
    """每层的 q（一个或两个）、kv_a、o，MLA 关闭时还有 kv_b；索引器的 wq_b 与 wk；MLP 或共享专家的三个；lm_head，草稿模型的 eh_proj。"""
    config, layers = module.config, module.layers
    absorbing = (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name)
    latent = any(site.op in absorbing for site in module.sites)
    attention = 4 + (config.q_lora_rank is not None) - latent
    mlps = sum(bool(config.n_shared_experts) or not config.is_moe_layer(layer) for layer in layers)
    indexers = sum(map(config.runs_indexer, layers))
    return attention * len(layers) + 2 * indexers + 3 * mlps + 1 + (module.role == "draft")


def linears_and_experts(module: GraphModule) -> int:
    """线性层，与每层专家（MoE 打开时每个 ``MoeExperts``）叠放的三个权重。"""
    experts = len(module.find(MOE_EXPERTS.name)) or sum(map(module.config.is_moe_layer, module.layers))
    return linear_layers(module) + 3 * experts


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


def check_cache(target: str, profile: OptimizationProfile) -> None:
    """这个目标能不能用方案里的缓存 dtype。

    Raises:
        DsxError: ``DSX-E322``，目标不支持 int8 缓存。
    """
    if profile.dsa.index_cache_dtype == "int8" and target in TENSORRT_TARGETS:
        raise DsxError(
            "DSX-E322",
            f"目标 {target} 不支持 dsa.index_cache_dtype=int8：TensorRT 的索引器只读浮点的缓存",
            "换 --target ort-cpu 或 portable；或去掉 dsa.index_cache_dtype",
        )
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
    check_cache(target, profile)
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
