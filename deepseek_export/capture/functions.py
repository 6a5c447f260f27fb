"""拼函数体的零件：追踪一个函数，变成函数体里的节点，再按契约表组成 FunctionProto。"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor

from deepseek_export.capture.trace import OPSET, Spec, TracedGraph, trace
from deepseek_export.ops.spec import OpSpec
from deepseek_export.ops.table import DOMAIN, OPSET_VERSION


def trace_function(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Spec],
    outputs: Sequence[str],
    **attributes: object,
) -> TracedGraph:
    """追踪一个模块级的函数；``attributes`` 是固化进图里的关键字参数。"""
    key = (function.__module__, function.__qualname__, sorted(attributes.items()))
    return trace(lambda: functools.partial(function, **attributes), inputs, outputs, key)


def nodes_of(graph: TracedGraph, prefix: str) -> list[onnx.NodeProto]:
    """追踪结果 → 可以拼进函数体的节点：中间值加前缀，常量变 ``Constant`` 节点（函数没有 initializer）。"""
    ports = {*graph.inputs, *graph.outputs}
    graph = graph.renamed(lambda name: name if name in ports else f"{prefix}/{name}")
    nodes = [constant(name, numpy_helper.to_array(tensor)) for name, tensor in graph.constants.items()]
    for index, node in enumerate(graph.nodes):
        # 函数会被内联，名字要自己保证唯一，TensorRT 的层名才能追回来。
        node.name = f"{prefix}/{node.op_type}_{index}"
        nodes.append(node)
    return nodes


def with_output(nodes: list[onnx.NodeProto], old: str, new: str) -> list[onnx.NodeProto]:
    """把节点的输出 ``old`` 改名成 ``new``；就地改。"""
    for node in nodes:
        node.output[:] = [new if name == old else name for name in node.output]
    return nodes


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    """一个 ``Constant`` 节点，输出叫 ``name``。"""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def scale_node() -> onnx.NodeProto:
    """节点的 ``scale`` 属性 → 值 ``scale``。"""
    node = helper.make_node("Constant", [], ["scale"])
    kind = onnx.AttributeProto.FLOAT
    node.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="scale", type=kind))
    return node


def function_of(spec: OpSpec, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    """按契约表组成 FunctionProto；声明全部属性，onnx 参考求值器要求节点带的属性都声明过。"""
    attributes = [a.name for a in spec.attributes] + ["plugin_namespace", "plugin_version"]
    return helper.make_function(
        DOMAIN,
        spec.name,
        [port.name for port in spec.inputs],
        [port.name for port in spec.outputs],
        nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        attributes,
    )
