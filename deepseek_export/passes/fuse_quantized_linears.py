"""权重由 ``DequantizeLinear`` 从 int8 还原的线性层 → ``QuantizedLinear``，它直接读码。"""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.coded_nodes import Coding, use_coded_linear
from deepseek_export.records import PassResult


class FuseQuantizedLinearsPass(Pass):
    """int8 的线性层交给插件，不再每步把整个权重还原成一份浮点的。

    改写：

    1. ``MatMul(x, Transpose(DequantizeLinear(码, scale)))``，码是 int8 的 → ``QuantizedLinear``；函数体就是这三个节点。

    不改写：

    2. 码是 int4 的：编译器自己把还原融进矩阵乘（TensorRT-RTX 1.7，sm80 / 86 / 89 / 120 的层），没有单独的还原；
    3. 浮点的。

    名字：x、y、码与 scale 保留。

    数值：同 :class:`~deepseek_export.passes.fuse_quantized_experts.FuseQuantizedExpertsPass`。
    """

    name: ClassVar[str] = "fuse-quantized-linears"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        found = int8_linears(module)
        for matmul, transpose, restore in found:
            codes, scales = restore.inputs
            use_coded_linear(module, matmul, transpose, (codes, scales), Coding(restore.attrs["block_size"]))
            module.replace(restore, [])
        return PassResult(name=self.name, changed=bool(found), count=len(found))


def int8_linears(module: GraphModule) -> list[tuple[gs.Node, gs.Node, gs.Node]]:
    """情形 1：(MatMul, Transpose, DequantizeLinear)，按图的次序。"""
    found = []
    for matmul in module.find("MatMul", domain=""):
        transpose = _producer(matmul.inputs[1], "Transpose")
        restore = transpose and _producer(transpose.inputs[0], "DequantizeLinear")
        if transpose is None or restore is None or len(restore.outputs[0].shape) != 2:
            continue
        recipe = module.weights.get(restore.inputs[0].name)
        if recipe is not None and recipe.dtype == "int8":
            found.append((matmul, transpose, restore))
    return found


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """产生 ``tensor`` 的节点；不是 ``op`` 为 ``None``。"""
    return next((node for node in tensor.inputs if node.op == op), None)
