"""V3 的 RoPE 先把成对的通道改成前后两半；这个次序可以一次排进权重的行里，不必每一步转置。"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import onnx_graphsurgeon as gs

from deepseek_export.passes.base import GraphModule, Pass
from deepseek_export.passes.quantize_linears_to_matmul_nbits import linears
from deepseek_export.records import PassResult

_PAIRS_TO_HALVES = [0, 1, 2, 4, 3]


class _Match(NamedTuple):
    """``rows`` 行一组，每组最后 ``tail`` 行是要旋转的通道。"""

    weight: gs.Variable
    source: gs.Tensor
    flatten: gs.Node
    rows: int
    tail: int


class AbsorbRopeLayoutPass(Pass):
    """把 ``Reshape → Transpose → Reshape`` 的重排换成权重的行序。

    改写：

    1. ``RotaryEmbedding`` 的输入由线性层的输出取出最后一段（逐头，或整行）、成对改成前后两半得来：线性层的权重换成行已重排的（配方
       ``deinterleave``），三个节点换成一个 ``Reshape``。

    不改写：

    2. V2 的成对布局、前后两半的布局：没有重排；
    3. 线性层带 bias（V3 的 ``attention_bias``），或它的输出、权重另有用处；旋转的不是最后一段（索引器的）。

    名字：权重名不变，行序写在配方里。数值：每个通道的点积不变。
    """

    name: ClassVar[str] = "absorb-rope-layout"

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        weights = {matmul.outputs[0].name: transpose.inputs[0] for matmul, transpose in linears(module)}
        count = 0
        for node in module.find("RotaryEmbedding", domain=""):
            match = _match(module, node, weights)
            if match is None:
                continue
            recipe = module.weights[match.weight.name]
            module.weights[match.weight.name] = recipe.model_copy(
                update={"op": "deinterleave", "groups": (match.rows, match.tail)}
            )
            match.flatten.inputs[0] = match.source
            count += 1
        if count:
            module.drop_unused()
        return PassResult(name=self.name, changed=count > 0, count=count)


def _match(module: GraphModule, rope: gs.Node, weights: dict[str, gs.Variable]) -> _Match | None:
    flatten = _producer(rope.inputs[0], "Reshape")
    transpose = flatten and _producer(flatten.inputs[0], "Transpose")
    pairs = transpose and _producer(transpose.inputs[0], "Reshape")
    # 情形 2。
    if not flatten or not transpose or not pairs or transpose.attrs.get("perm") != _PAIRS_TO_HALVES:
        return None
    source = pairs.inputs[0]
    unsqueeze = _producer(source, "Unsqueeze")
    part = unsqueeze.inputs[0] if unsqueeze else source
    split = _producer(part, "Split")
    if split is None or any(
        len(tensor.outputs) != 1 for tensor in (*_path(rope, flatten), *split.outputs[1:])
    ):
        return None
    whole = split.inputs[0]
    view = _producer(whole, "Reshape")
    linear = view.inputs[0] if view else whole
    weight = weights.get(linear.name)
    # 情形 3。
    if weight is None or any(len(tensor.outputs) != 1 for tensor in (whole, linear, weight)):
        return None
    rows, recipe = whole.shape[-1], module.weights[weight.name]
    if part is not split.outputs[-1] or recipe.op != "copy" or recipe.shape[0] % rows:
        return None
    return _Match(weight, source, flatten, rows, part.shape[-1])


def _path(rope: gs.Node, flatten: gs.Node) -> tuple[gs.Tensor, ...]:
    """被绕过的几个张量，从下往上。"""
    transposed = flatten.inputs[0]
    return rope.inputs[0], transposed, transposed.inputs[0].inputs[0]


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    node = tensor.inputs[0] if tensor.inputs else None
    return node if node is not None and node.op == op else None
