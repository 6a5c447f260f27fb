"""``MatMulNBits``、``QMoE`` → ``dsx::Int8Linear``、``dsx::Int4Linear``、``dsx::Int8Experts``、``dsx::Int4Experts`` 等，原来的节点成为函数体。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import KERNEL_SCALE
from deepseek_export.ops.spec import OpSpec
from deepseek_export.ops.table import (
    DOMAIN,
    INT4_AFFINE_EXPERTS,
    INT4_AFFINE_LINEAR,
    INT4_EXPERTS,
    INT4_LINEAR,
    INT8_EXPERTS,
    INT8_LINEAR,
    OPSET_VERSION,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
)
from deepseek_export.passes.base import DOMAIN_VERSIONS, MICROSOFT, GraphModule, Pass
from deepseek_export.passes.ort_moe import MOE_ATTRIBUTES, scope
from deepseek_export.passes.ort_quant import ACCURACY_LEVEL
from deepseek_export.records import PassResult

_PLUGIN = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
#: 各节点不同、函数体经属性引用取值的属性；其余固化在函数体里。
_FREE = ("K", "N")
#: onnxruntime 的算子、属性必须是什么、dsx 的算子；有零点的见 :data:`_AFFINE`。
_WRAPPED = (
    ("MatMulNBits", {"bits": 8, "accuracy_level": ACCURACY_LEVEL}, INT8_LINEAR),
    ("MatMulNBits", {"bits": 4, "accuracy_level": ACCURACY_LEVEL}, INT4_LINEAR),
    ("QMoE", {"expert_weight_bits": 8, **MOE_ATTRIBUTES}, INT8_EXPERTS),
    ("QMoE", {"expert_weight_bits": 4, **MOE_ATTRIBUTES}, INT4_EXPERTS),
)
#: 同一个节点，零点逐块给出时的算子。
_AFFINE = {INT4_LINEAR.name: INT4_AFFINE_LINEAR, INT4_EXPERTS.name: INT4_AFFINE_EXPERTS}


class WrapQuantKernelsPass(Pass):
    """让量化的矩阵乘可以换 kernel：图里是 dsx 算子，函数体是 onnxruntime 自己的那个节点。

    同一个 bundle 有 C++ 算子库时走它的 kernel，没有时函数体内联回原来的节点，一位不差。图与导出时有没有库无关。两者的精度不同：
    onnxruntime 的节点把激活逐块舍入到 int8，算子库的 kernel 留约 15 位（CPU-12），见 docs/perf/precision.md。

    改写：

    1. ``MatMulNBits`` → ``Int8Linear`` / ``Int4Linear``，零点逐块给出的 → ``Int4AffineLinear``；
    2. ``QMoE`` → ``Int8Experts`` / ``Int4Experts`` / ``Int4AffineExperts``，其余属性（swiglu、在选中的 k 个上归一化）固化在函数体里，也就是算子的语义；
    3. 它们的 scale 存成 float16（块 32 的 int4 因此少读一成），码按舍入之后的 scale 取。onnxruntime 的节点要 float32 的，函数体的开头转回去，
       建会话时折叠掉。

    名字：输入、输出与权重保留。

    数值：scale 舍入到 float16 是 2^-11 的相对误差，码又按它取，权重的误差几乎不变：每个权重的误差写在
    ``reports/export.json``，对 logits 的见 docs/perf/precision.md。
    """

    name: ClassVar[str] = "wrap-quant-kernels"

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
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if len(inputs) > len(spec.inputs):
        spec = _AFFINE[spec.name]
    module.functions.setdefault(spec.name, _body(node, spec, module.graph.opset))
    own = {attribute.name: node.attrs[attribute.name] for attribute in spec.attributes}
    for tensor in inputs:
        # 情形 3；几个节点共用的权重只换一次。
        if (recipe := module.weights.get(tensor.name)) is not None:
            module.weights[tensor.name] = _narrowed(recipe)
            if recipe.op == "scales":
                tensor.dtype = np.dtype(KERNEL_SCALE)
    wrapped = gs.Node(
        op=spec.name,
        name=f"{scope(node)}/{spec.name}",
        domain=DOMAIN,
        attrs=own | _PLUGIN,
        inputs=inputs,
        outputs=list(node.outputs),
    )
    module.replace(node, [wrapped])


def _narrowed(recipe: Recipe) -> Recipe:
    """scale 是 float16 的同一个配方；码也随之而变，因为它按舍入之后的 scale 取。"""
    if recipe.form is None:
        return recipe
    form = recipe.form.model_copy(update={"scale": KERNEL_SCALE})
    dtype = KERNEL_SCALE if recipe.op == "scales" else recipe.dtype
    return recipe.model_copy(update={"form": form, "dtype": dtype})


def _body(node: gs.Node, spec: OpSpec, opset: int) -> onnx.FunctionProto:
    """只有 ``node`` 一个节点的函数体，scale 先转成 float32；空着的可选输入仍空着。"""
    wide = {port.name: f"{port.name}/float32" for port in spec.inputs if port.type == "F16"}
    ports = iter(spec.inputs)
    names = ["" if tensor.is_empty() else next(ports).name for tensor in node.inputs]
    fixed = {name: value for name, value in node.attrs.items() if name not in _FREE}
    casts = [helper.make_node("Cast", [name], [out], to=TensorProto.FLOAT) for name, out in wide.items()]
    call = helper.make_node(
        node.op,
        [wide.get(name, name) for name in names],
        [port.name for port in spec.outputs],
        domain=MICROSOFT,
        **fixed,
    )
    for name in _FREE:
        if name in node.attrs:
            reference = onnx.AttributeProto(name=name, ref_attr_name=name, type=onnx.AttributeProto.INT)
            call.attribute.append(reference)
    versions = {"": opset, DOMAIN: OPSET_VERSION, MICROSOFT: DOMAIN_VERSIONS[MICROSOFT]}
    return helper.make_function(
        DOMAIN,
        spec.name,
        [port.name for port in spec.inputs],
        [port.name for port in spec.outputs],
        [*casts, call],
        [helper.make_opsetid(domain, version) for domain, version in versions.items()],
        [*(attribute.name for attribute in spec.attributes), *_PLUGIN],
    )
