"""``Reshape`` 的目标形状由追踪器在运行时拼出来；多数在编译时就定得下来，不必每一步算一遍。"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.ort_moe import scope
from deepseek_export.records import PassResult

#: 只改形状、不动数据的算子。
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")

_Shape = tuple[int | str, ...]


class FoldReshapeShapesPass(Pass):
    """解码一步只有一行，几十微秒的算子里有一半是在拼形状；去掉它们。

    改写：

    1. ``Reshape`` 的输出的每一维或是常数，或与输入同一位置的符号维相同（写 0），此外至多一维未知（写 -1）：目标形状换成常量；
    2. 一串只改形状的算子，终点与起点形状相同：直接用起点；终点是 dsx 算子的输入或输出时名字要留着（逐算子校验按名字找），换成
       ``Identity``，ONNX Runtime 加载时会去掉它；
    3. ``Shape`` 取的是同样的符号维、``Concat`` 拼的是同样的形状：一层只留第一个。不跨层，逐块校验才能从层的边界处断开。

    不改写：

    4. 有两维以上推不出来的 ``Reshape``（例如 [B*S, D] 还原成 [B, S, D]）；
    5. 声明的形状不全的张量。

    符号维同名即相等，这是捕获时的守卫保证的。名字：留下的节点与值都不改名。数值：一位不变。
    """

    name: ClassVar[str] = "fold-reshape-shapes"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        count = 0
        for node in module.find("Reshape", domain=""):
            count += _constant_target(module, node)
        count += _skip_round_trips(module)
        count += _share_shapes(module)
        if count:
            module.drop_unused()
        return PassResult(name=self.name, changed=count > 0, count=count)


def _shape(tensor: gs.Tensor) -> _Shape | None:
    return None if tensor.shape is None or None in tensor.shape else tuple(tensor.shape)


def _constant_target(module: GraphModule, node: gs.Node) -> int:
    """情形 1；返回改写了几处。"""
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    # 情形 4、5。
    if before is None or after is None or isinstance(node.inputs[1], gs.Constant):
        return 0
    target = [_target(dim, index, before) for index, dim in enumerate(after)]
    if target.count(-1) > 1:
        return 0
    text = "_".join(map(str, target))
    node.inputs[1] = module.constant(f"constants/shape_{text}", np.array(target, np.int64))
    node.attrs.pop("allowzero", None)  # 0 从此是「与输入相同」
    return 1


def _target(dim: int | str, index: int, before: _Shape) -> int:
    if isinstance(dim, int):
        return dim
    return 0 if index < len(before) and before[index] == dim else -1


def _skip_round_trips(module: GraphModule) -> int:
    """情形 2；返回改写了几处。"""
    count = 0
    outputs = {id(tensor) for tensor in module.graph.outputs}
    ports = {name for site in module.sites for name in (*site.inputs, *site.outputs)}
    for node in module.graph.nodes:
        end = node.outputs[0]
        if node.op not in _VIEWS or id(end) in outputs or not end.outputs:
            continue
        if (source := _origin(node)) is None:
            continue
        if end.name in ports:
            node.op, node.attrs = "Identity", {}
            node.inputs.clear()
            node.inputs.append(source)
        else:
            module.reroute(end, source)
        count += 1
    return count


def _origin(node: gs.Node) -> gs.Tensor | None:
    """往上经过一串只改形状的算子，最远的那个形状与 ``node`` 的输出相同的张量。"""
    wanted, found = _shape(node.outputs[0]), None
    tensor = node.inputs[0]
    while wanted is not None:
        if _shape(tensor) == wanted:
            found = tensor
        if not tensor.inputs or tensor.inputs[0].op not in _VIEWS:
            break
        tensor = tensor.inputs[0].inputs[0]
    return found


def _share_shapes(module: GraphModule) -> int:
    """情形 3；返回去掉了几个节点。"""
    count, first = 0, dict[tuple, gs.Tensor]()
    for node in module.graph.nodes:
        key = _key(node)
        if key is None:
            continue
        kept, end = first.setdefault(key, node.outputs[0]), node.outputs[0]
        if kept is not end and end.outputs:
            module.reroute(end, kept)
            count += 1
    return count


def _key(node: gs.Node) -> tuple | None:
    """算的是同一个值的节点，这个键相同；``None`` 表示不在此列。"""
    layer = scope(node).split(".")[:2]
    if node.op == "Shape":
        shape = _shape(node.inputs[0])
        if shape is None:
            return None
        return *layer, "Shape", shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    if node.op == "Concat" and all(_is_shape_part(tensor) for tensor in node.inputs):
        return *layer, "Concat", node.attrs["axis"], *(tensor.name for tensor in node.inputs)
    return None


def _is_shape_part(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or bool(tensor.inputs and tensor.inputs[0].op == "Shape")
