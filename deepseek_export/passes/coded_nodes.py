"""权重是码的插件核：节点、函数体，以及哪些矩阵乘换得成它；几个 pass 共用。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from deepseek_export.capture.functions import constant, function_of
from deepseek_export.checkpoint.fp8 import E4M3_VALUES
from deepseek_export.ops.spec import OpSpec
from deepseek_export.ops.table import (
    DOMAIN,
    MLA_ATTENTION,
    MOE_EXPERTS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    QUANTIZED_LINEAR,
    QUANTIZED_MOE_EXPERTS,
    SPARSE_MLA_ATTENTION,
)
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.ort_moe import port, scope
from deepseek_export.passes.quantize_linears_to_matmul_nbits import linears

#: 专家的三个权重，次序同契约。
EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")

#: 按 int8 的次序，-128 起：码加 128 就是下标。
_E4M3 = np.roll(E4M3_VALUES, 128)
_PLUGIN = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}


@dataclass(frozen=True)
class Coding:
    """码怎么写，见契约的同名属性。

    Attributes:
        block_size, block_rows: 一个 scale 管几列、几行。
        e4m3: 码是检查点的 FP8，还是有符号的整数。
    """

    block_size: int
    block_rows: int = 1
    e4m3: bool = False

    @property
    def attributes(self) -> dict[str, int | str]:
        """节点的属性。"""
        own = {"block_size": self.block_size, "block_rows": self.block_rows, "e4m3": int(self.e4m3)}
        return own | _PLUGIN


#: 一个权重的码与 scale。
Coded = tuple[gs.Tensor, gs.Tensor]


def use_coded_experts(
    module: GraphModule, experts: gs.Node, weights: Sequence[Coded], coding: Coding
) -> None:
    """``MoeExperts`` → ``QuantizedMoeExperts``。"""
    spec = QUANTIZED_MOE_EXPERTS
    node = gs.Node(
        op=spec.name,
        name=f"{scope(experts)}/{spec.name}",
        domain=DOMAIN,
        attrs=coding.attributes,
        inputs=[
            *(port(experts, name) for name in ("x", "topk_ids", "topk_weights")),
            *(tensor for pair in weights for tensor in pair),
        ],
        outputs=list(experts.outputs),
    )
    inputs = [port.name for port in spec.inputs[:3]] + [f"{name}/restored" for name in EXPERT_WEIGHTS]
    call = helper.make_node(
        MOE_EXPERTS.name, inputs, ["y"], name=f"experts/{MOE_EXPERTS.name}", domain=DOMAIN, **_PLUGIN
    )
    _set_body(module, spec, EXPERT_WEIGHTS, [call], coding)
    module.replace(experts, [node])


def use_coded_linear(
    module: GraphModule, matmul: gs.Node, transpose: gs.Node, weight: Coded, coding: Coding
) -> None:
    """``MatMul(x, Transpose(w))`` → ``QuantizedLinear``；别处还读的 ``Transpose`` 留着。"""
    spec = QUANTIZED_LINEAR
    node = gs.Node(
        op=spec.name,
        name=f"{scope(matmul)}/{spec.name}",
        domain=DOMAIN,
        attrs=coding.attributes,
        inputs=[matmul.inputs[0], *weight],
        outputs=list(matmul.outputs),
    )
    turned = helper.make_node("Transpose", ["w/restored"], ["w/turned"], name="linear/Transpose", perm=[1, 0])
    call = helper.make_node("MatMul", ["x", "w/turned"], ["y"], name="linear/MatMul")
    _set_body(module, spec, ("w",), [turned, call], coding)
    module.replace(matmul, [node])
    if not transpose.outputs[0].outputs:
        module.replace(transpose, [])


def plain_linears(module: GraphModule) -> list[tuple[gs.Node, gs.Node]]:
    """线性层，(MatMul, Transpose)；``MlaAttention`` 的 w_kv_b 吸收之后是按头分批的矩阵乘，两条路径用同一份浮点的，不在其中。"""
    absorbed = absorbed_weights(module)
    return [pair for pair in linears(module) if pair[1].inputs[0].name not in absorbed]


def absorbed_weights(module: GraphModule) -> set[str]:
    """各层的 w_kv_b。"""
    index = MLA_ATTENTION.find("w_kv_b")[1]
    attention = (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name)
    return {site.inputs[index] for site in module.sites if site.op in attention}


def _set_body(
    module: GraphModule, spec: OpSpec, weights: Sequence[str], calls: list[onnx.NodeProto], coding: Coding
) -> None:
    """还原各权重，再做 ``calls``；一张图里的码都是一种，合法性检查守着。"""
    if spec.name in module.functions:
        return
    rank = {one.name: len(one.dims) for one in spec.inputs}
    nodes: list[onnx.NodeProto] = []
    for name in weights:
        restore = _widened_blocks if coding.e4m3 else _dequantized
        nodes.extend(restore(name, rank[name]))
    module.functions[spec.name] = function_of(spec, [*nodes, *calls])


def _dequantized(name: str, rank: int) -> Iterator[onnx.NodeProto]:
    op = "DequantizeLinear"
    node = helper.make_node(
        op, [name, f"{name}_scales"], [f"{name}/restored"], name=f"{name}/{op}", axis=rank - 1
    )
    node.attribute.append(_reference("block_size", "block_size"))
    yield node


def _widened_blocks(name: str, rank: int) -> Iterator[onnx.NodeProto]:
    """e4m3 查表，scale 沿两维各铺开，相乘；float32 里算，最后舍入到 x 的 dtype。"""

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [f"{name}/{output}"], name=f"{name}/{output}", **attributes)

    scales = f"{name}_scales"
    yield constant(f"{name}/e4m3", _E4M3)
    yield constant(f"{name}/middle", np.array(128, np.int32))
    yield node("Cast", [name], "codes", to=TensorProto.INT32)
    yield node("Add", [f"{name}/codes", f"{name}/middle"], "place")
    yield node("Gather", [f"{name}/e4m3", f"{name}/place"], "values", axis=0)
    yield node("Constant", [], "zero", value_int=0)
    yield node("Constant", [], "one", value_int=1)
    for axis, attribute in ((rank - 2, "block_rows"), (rank - 1, "block_size")):
        block = node("Constant", [], attribute)
        block.attribute.append(_reference("value_int", attribute))
        yield block
        yield node("Shape", [name], f"{attribute}/shape", start=axis, end=axis + 1)
        yield node("Squeeze", [f"{name}/{attribute}/shape"], f"{attribute}/length")
        yield node(
            "Range", [f"{name}/zero", f"{name}/{attribute}/length", f"{name}/one"], f"{attribute}/each"
        )
        yield node("Div", [f"{name}/{attribute}/each", f"{name}/{attribute}"], f"{attribute}/index")
        yield node("Gather", [scales, f"{name}/{attribute}/index"], f"{attribute}/scales", axis=axis)
        scales = f"{name}/{attribute}/scales"
    yield node("Mul", [f"{name}/values", scales], "product")
    yield node("CastLike", [f"{name}/product", "x"], "restored")


def _reference(name: str, attribute: str) -> onnx.AttributeProto:
    """节点的属性 ``attribute`` → 函数体里那个节点的 ``name``。"""
    return onnx.AttributeProto(name=name, ref_attr_name=attribute, type=onnx.AttributeProto.INT)
