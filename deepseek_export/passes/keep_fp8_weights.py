"""来源是 FP8 分块的权重：字节原样留着，由插件读码。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.coded_nodes import (
    EXPERT_WEIGHTS,
    Coded,
    Coding,
    absorbed_weights,
    plain_linears,
    use_coded_experts,
    use_coded_linear,
)
from deepseek_export.passes.ort_moe import port, scope
from deepseek_export.records import PassResult, Refusal


class KeepFp8WeightsPass(Pass):
    """FP8 检查点的权重不还原成两倍大的浮点：码与 scale 按检查点的字节存，插件在寄存器里还原。

    改写：

    1. 三个权重都来自 FP8 的 ``MoeExperts`` → ``QuantizedMoeExperts``；
    2. 权重来自 FP8 的 ``MatMul(x, Transpose(w))`` → ``QuantizedLinear``。

    码 [N, K] 的排列与检查点的相同，不转置。线性层按引用时直接指进检查点；专家在检查点里逐个存放，插件要叠成 [E, N, K] 的一个，
    所以按引用的在加载时叠一次，字节不变。

    不改写，仍还原成模型 dtype，写进 ``refused``：

    3. 吸收进注意力的 w_kv_b：按头分批的矩阵乘，两条路径要用同一份浮点的；
    4. 其余的用法（MoE 关闭时的专家、三个权重不都是 FP8 的），以及 scale 管的列数不是 2 的幂的检查点：没有读得了它的插件。

    名字：输入、输出保留；新权重叫 ``{w}.fp8`` 与 ``{w}.fp8.scales``。

    码的类型是 int8，每个字节一个 e4m3：TensorRT 为 sm80、sm86 建的引擎里不许有 FP8；函数体查表。

    数值：码是准的，乘 scale 舍入到模型 dtype 还是不舍入，差在一次舍入之内；与还原之后存的相比没有别的损失。
    """

    name: ClassVar[str] = "keep-fp8-weights"

    def __init__(self, sources: Fp8Sources) -> None:
        self.sources = sources

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        rows, columns = self.sources.block
        coding, count = Coding(columns, rows, e4m3=True), 0
        stored = set(fp8_weights(module, self.sources)) if self.sources.readable else set()
        for experts in module.find(MOE_EXPERTS.name):
            weights = [port(experts, name) for name in EXPERT_WEIGHTS]
            # 情形 1。
            if stored.issuperset(weight.name for weight in weights):
                coded = [self._coded(module, weight) for weight in weights]
                use_coded_experts(module, experts, coded, coding)
                count += len(weights)
        for matmul, transpose in plain_linears(module):
            weight = transpose.inputs[0]
            # 情形 2。
            if weight.name in stored:
                use_coded_linear(module, matmul, transpose, self._coded(module, weight), coding)
                count += 1
        refused = tuple(self._refusals(module))
        return PassResult(name=self.name, changed=count > 0, count=count, refused=refused)

    def _coded(self, module: GraphModule, weight: gs.Variable) -> Coded:
        codes, scales = self.sources.recipes(module.weights[weight.name])
        name = f"{weight.name}.fp8"
        return (
            module.add_weight(name, codes, before=weight),
            module.add_weight(f"{name}.scales", scales, before=weight),
        )

    def _refusals(self, module: GraphModule) -> Iterator[Refusal]:
        absorbed = absorbed_weights(module)
        users = {tensor.name: node for node in reversed(module.graph.nodes) for tensor in node.inputs}
        for name in fp8_weights(module, self.sources):
            if name not in users:
                continue
            # 情形 3、4。
            reason = "FP8 的权重还原成模型的 dtype 存，没有读得了它的插件"
            if name in absorbed:
                reason = "吸收进注意力的 w_kv_b 要浮点，FP8 的还原成模型的 dtype 存"
            where = f"{scope(users[name]).removesuffix('/mla')}/{users[name].op}"
            yield Refusal(node=where, reason=reason, value=f"{name} 的块是 {list(self.sources.block)}")


def fp8_weights(module: GraphModule, sources: Fp8Sources) -> list[str]:
    """图里来源是 FP8、存成浮点的权重。"""
    return [name for name, recipe in module.weights.items() if sources.holds(recipe)]
