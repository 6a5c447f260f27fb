"""线性层与专家的权重 → int8 / int4 的码，使用前由 ``DequantizeLinear`` 还原。"""

from __future__ import annotations

import re
from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.passes.base import GraphModule, Pass, PassError
from deepseek_export.passes.coded_nodes import plain_linears
from deepseek_export.passes.ort_moe import scope
from deepseek_export.passes.ort_quant import quantized_weight
from deepseek_export.records import PassResult, Refusal

_GROUP = re.compile(r"\.experts\.\{\d+\.\.\d+\}\.")


class QuantizeWeightsToDequantizeLinearPass(Pass):
    """只量化权重，只用标准算子：TensorRT 认得 ``DequantizeLinear``，权重以码的形式留在引擎里。

    改写：

    1. ``MatMul(x, Transpose(w))`` 的 w：``Transpose`` 改从 ``DequantizeLinear(码, scale)`` 取，码是 [N, K]，沿 K 分块；
    2. 叠放的专家权重 [E, N, K]，不论消费者是 ``MoeExperts``（插件）还是展开的写法：每个消费者改从 ``DequantizeLinear`` 取。

    scale 的 dtype 就是模型的 dtype，强类型的网络才建得出来。

    不改写：

    3. 权重或所在模块在 ``keep`` 里：用户要的，不算拒绝；
    4. K 不是 block 的倍数：拒绝，TensorRT 没有不满的块；
    5. ``MlaAttention`` 的 w_kv_b：吸收之后是按头分批的矩阵乘，两条路径要用同一份，与 ``ort-cpu`` 一样始终浮点。

    名字：原来的值全部保留；新权重叫 ``{w}.{kind}`` 与 ``{w}.{kind}.scales``，还原的值叫 ``{节点}/{w}``。

    数值：码乘 scale 精确到模型 dtype 的一次舍入，之后与没有量化时相同；激活不舍入。

    引擎（TensorRT-RTX 1.7，sm80 / 86 / 89 / 120 的层）：int4 的线性层与矩阵乘融成一层；int8 分块的融不了，由
    :class:`~deepseek_export.passes.fuse_quantized_linears.FuseQuantizedLinearsPass` 接着交给插件，专家的由
    :class:`~deepseek_export.passes.fuse_quantized_experts.FuseQuantizedExpertsPass`。
    """

    name: ClassVar[str] = "quantize-weights-to-dequantize-linear"

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self._left: set[str] = set()

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count, kept, refused, self._left = 0, 0, [], set[str]()
        block = self.quantization.block
        for node, index, where in _uses(module):
            weight = node.inputs[index]
            width = weight.shape[-1]
            # 情形 3；与词嵌入共享权重时，只有模块路径认得出 lm_head。
            if self.quantization.keeps(where, _whole(weight.name)):
                self._left.add(node.name)
                kept += 1
            # 情形 4。
            elif width % block:
                self._left.add(node.name)
                reason = f"DequantizeLinear 要求输入宽度是 block（{block}）的倍数"
                refused.append(
                    Refusal(node=f"{where}/{node.op}", reason=reason, value=f"{weight.name} 的宽度 = {width}")
                )
            else:
                self._rewrite(module, node, index)
                name = "lm_head.weight" if where == "head.lm_head" else _whole(weight.name)
                module.quantized.add(name)
                count += 1
        return PassResult(name=self.name, changed=count > 0, count=count, refused=tuple(refused), kept=kept)

    def ensures(self, module: GraphModule) -> None:
        """剩下的浮点权重恰好是要保留的与拒绝的。"""
        left = {node.name for node, *_ in _uses(module)}
        if left != self._left:
            raise PassError(f"还用浮点权重的 {sorted(left)} 与保留的、拒绝的 {sorted(self._left)} 不一致")

    def _rewrite(self, module: GraphModule, node: gs.Node, index: int) -> None:
        # 情形 1、2。
        weight, form = node.inputs[index], self.quantization.format(module.dtype)
        codes, scales, _ = quantized_weight(module, weight, form, signed=True)
        inputs = [codes, scales]
        restored = gs.Variable(f"{node.name}/{weight.name}", weight.dtype, list(weight.shape))
        attrs = {"axis": len(weight.shape) - 1, "block_size": form.block}
        where = f"{node.name}/DequantizeLinear_{index}"
        position = next(i for i, other in enumerate(module.graph.nodes) if other is node)
        module.graph.nodes.insert(
            position,
            gs.Node(op="DequantizeLinear", name=where, attrs=attrs, inputs=inputs, outputs=[restored]),
        )
        node.inputs[index] = restored


def _uses(module: GraphModule) -> list[tuple[gs.Node, int, str]]:
    """用到可以量化的权重之处：(节点, 第几个输入, 所在模块)；线性层是它的 ``Transpose``。"""
    # 情形 5。
    scopes = {id(transpose): scope(matmul) for matmul, transpose in plain_linears(module)}
    found = []
    for node in module.graph.nodes:
        if id(node) in scopes:
            found.append((node, 0, scopes[id(node)]))
            continue
        for index, tensor in enumerate(node.inputs):
            recipe = module.weights.get(tensor.name)
            if recipe is not None and recipe.op == "stack":
                found.append((node, index, scope(node)))
    return found


def _whole(name: str) -> str:
    """太大的专家权重按编号拆过组；记的是拆之前的名字。"""
    return _GROUP.sub(".experts.*.", name)
