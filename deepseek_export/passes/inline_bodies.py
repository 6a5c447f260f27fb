"""把某个 ``dsx::`` 算子的函数体展开在主图里。"""

from __future__ import annotations

from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from deepseek_export.ops.table import MOE_GATE, SPEC_ACCEPT, SPEC_ACCEPT_REJECTION
from deepseek_export.passes.base import IR_VERSION, GraphModule, Pass
from deepseek_export.records import PassResult


class InlineBodiesPass(Pass):
    """``op`` 的每个节点换成它的函数体，中间值与节点名加上该节点所在的模块路径。

    TensorRT 也会内联没有插件的函数，但不给内层节点加前缀：每层的 router 都叫一个名字，引擎的层就追不回是哪一层。

    改写：

    1. 主图里的 ``dsx::op``。函数体里没有属性引用：这几个算子的属性已固化在结构里。

    不改写：

    2. 没有这样的节点。

    名字：节点的输入、输出保留。
    """

    op: ClassVar[str]

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        nodes = module.find(self.op)
        for node in nodes:
            module.replace(node, _inlined(module.functions[self.op], node))
        return PassResult(name=self.name, changed=bool(nodes), count=len(nodes))


class InlineMoeGatePass(InlineBodiesPass):
    """路由留给原生算子：整条 router 编成几个层，不值得一个插件。情形见 :class:`InlineBodiesPass`。"""

    name: ClassVar[str] = "inline-moe-gate"
    op: ClassVar[str] = MOE_GATE.name


class InlineSpecAcceptPass(InlineBodiesPass):
    """greedy 草稿验证。情形见 :class:`InlineBodiesPass`。"""

    name: ClassVar[str] = "inline-spec-accept"
    op: ClassVar[str] = SPEC_ACCEPT.name


class InlineSpecAcceptRejectionPass(InlineBodiesPass):
    """拒绝采样验证。情形见 :class:`InlineBodiesPass`。"""

    name: ClassVar[str] = "inline-spec-accept-rejection"
    op: ClassVar[str] = SPEC_ACCEPT_REJECTION.name


def _inlined(body: onnx.FunctionProto, call: gs.Node) -> list[gs.Node]:
    """函数体的一份副本，端口接到 ``call`` 的输入输出上；``Constant`` 节点变成常量。"""
    ports: dict[str, gs.Tensor] = dict(zip(body.input, call.inputs, strict=True))
    ports |= dict(zip(body.output, call.outputs, strict=True))
    prefix = f"{call.name.rpartition('/')[0]}/{body.name}"
    nodes = []
    for node in _import(body):
        if node.op == "Constant":
            name = node.outputs[0].name
            value = next(p.attribute[0].t for p in body.node if list(p.output) == [name])
            ports[name] = gs.Constant(f"{prefix}/{name}", numpy_helper.to_array(value))
            continue
        for tensors in (node.inputs, node.outputs):
            for index, tensor in enumerate(tensors):
                if not tensor.is_empty():
                    tensors[index] = ports.setdefault(
                        tensor.name, gs.Variable(f"{prefix}/{tensor.name}", tensor.dtype, tensor.shape)
                    )
        node.name = f"{prefix}/{node.name}"
        nodes.append(node)
    return nodes


def _import(body: onnx.FunctionProto) -> list[gs.Node]:
    """函数体 → gs 节点；端口的类型随便给一个，接线时就换掉了。"""
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
        for names in (body.input, body.output)
    )
    graph = helper.make_graph(body.node, body.name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=body.opset_import, ir_version=IR_VERSION)
    return list(gs.import_onnx(model).nodes)
