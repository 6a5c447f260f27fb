"""每个目标的流水线：从上到下就是执行次序。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import (
    LIGHTNING_INDEXER,
    MLA_ATTENTION,
    MOE_EXPERTS,
    MOE_GATE,
    SPARSE_MLA_ATTENTION,
    SPEC_ACCEPT,
    SPEC_ACCEPT_REJECTION,
)
from deepseek_export.passes.absorb_rope_layout import AbsorbRopeLayoutPass
from deepseek_export.passes.base import MICROSOFT, GraphModule, Pass
from deepseek_export.passes.bound_mla_cache import BoundMlaCachePass
from deepseek_export.passes.expected import (
    Count,
    absorbable_ropes,
    biased_ropes,
    linear_layers,
    linears_and_experts,
    nodes,
    oversized_experts,
    paired_ropes,
)
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
from deepseek_export.records import PassResult


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
        target: 编译目标，先过 :func:`~deepseek_export.passes.lowering.check_target`。
        quantization: 只量化权重；``None`` 不量化。先过 :func:`~deepseek_export.passes.lowering.check_quantization`。
        oversized: 有没有一个张量装不下的权重。
        fp8: 检查点里的 FP8 张量；``None`` 是没有。只有 TensorRT 的目标把它们原样留着。
    """
    return list(_PIPELINES[target](quantization, oversized, fp8))
