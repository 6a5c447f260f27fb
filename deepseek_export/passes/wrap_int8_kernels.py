"""8 位的 ``MatMulNBits``、``QMoE`` → ``dsx::Int8Linear``、``dsx::Int8Experts``，原来的节点成为函数体。"""

from __future__ import annotations

from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from deepseek_export.ops.table import (
    DOMAIN,
    INT8_EXPERTS,
    INT8_LINEAR,
    OPSET_VERSION,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    OpSpec,
)
from deepseek_export.passes.base import DOMAIN_VERSIONS, MICROSOFT, GraphModule, Pass
from deepseek_export.passes.ort_moe import MOE_ATTRIBUTES, scope
from deepseek_export.passes.ort_quant import ACCURACY_LEVEL
from deepseek_export.records import PassResult

_PLUGIN = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
#: 各节点不同、函数体经属性引用取值的属性；其余固化在函数体里。
_FREE = ("K", "N")
#: onnxruntime 的算子、属性必须是什么、dsx 的算子。
_WRAPPED = (
    ("MatMulNBits", {"bits": 8, "accuracy_level": ACCURACY_LEVEL}, INT8_LINEAR),
    ("QMoE", {"expert_weight_bits": 8, **MOE_ATTRIBUTES}, INT8_EXPERTS),
)


class WrapInt8KernelsPass(Pass):
    """让 int8 的矩阵乘可以换 kernel：图里是 dsx 算子，函数体是 onnxruntime 自己的那个节点。

    同一个 bundle 有 C++ 算子库时走它的 kernel，没有时函数体内联回原来的节点，一位不差。图与导出时有没有库无关。两者的精度不同：
    onnxruntime 的节点把激活逐块舍入到 int8，算子库的 kernel 留约 15 位（CPU-12），演示模型上全部 token 的 logits 误差因此少两成。

    改写：

    1. ``MatMulNBits(bits=8)`` → ``Int8Linear``；
    2. ``QMoE(expert_weight_bits=8)`` → ``Int8Experts``，其余属性（swiglu、在选中的 k 个上归一化）固化在函数体里，也就是
       ``Int8Experts`` 的语义。

    不改写：

    3. 4 位的：算子库没有这样的 kernel。

    名字：输入、输出与权重保留。
    """

    name: ClassVar[str] = "wrap-int8-kernels"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count = 0
        for op, required, spec in _WRAPPED:
            for node in module.find(op, domain=MICROSOFT):
                if required.items() <= node.attrs.items():
                    _wrap(module, node, spec)
                    count += 1
        return PassResult(name=self.name, changed=count > 0, count=count)


def _wrap(module: GraphModule, node: gs.Node, spec: OpSpec) -> None:
    module.functions.setdefault(spec.name, _body(node, spec))
    own = {attribute.name: node.attrs[attribute.name] for attribute in spec.attributes}
    wrapped = gs.Node(
        op=spec.name,
        name=f"{scope(node)}/{spec.name}",
        domain=DOMAIN,
        attrs=own | _PLUGIN,
        inputs=[tensor for tensor in node.inputs if not tensor.is_empty()],
        outputs=list(node.outputs),
    )
    module.replace(node, [wrapped])


def _body(node: gs.Node, spec: OpSpec) -> onnx.FunctionProto:
    """只有 ``node`` 一个节点的函数体；空着的可选输入仍空着。"""
    ports = iter(spec.inputs)
    inputs = ["" if tensor.is_empty() else next(ports).name for tensor in node.inputs]
    fixed = {name: value for name, value in node.attrs.items() if name not in _FREE}
    call = helper.make_node(node.op, inputs, [port.name for port in spec.outputs], domain=MICROSOFT, **fixed)
    for name in _FREE:
        if name in node.attrs:
            reference = onnx.AttributeProto(name=name, ref_attr_name=name, type=onnx.AttributeProto.INT)
            call.attribute.append(reference)
    versions = {DOMAIN: OPSET_VERSION, MICROSOFT: DOMAIN_VERSIONS[MICROSOFT]}
    return helper.make_function(
        DOMAIN,
        spec.name,
        [port.name for port in spec.inputs],
        [port.name for port in spec.outputs],
        [call],
        [helper.make_opsetid(domain, version) for domain, version in versions.items()],
        [*(attribute.name for attribute in spec.attributes), *_PLUGIN],
    )
