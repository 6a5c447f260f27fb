"""``MlaAttention`` 的 w_kv_b 存成逐块的 int8：吸收形式里它每一步都要整个读一遍，却不是矩阵乘节点，别的量化 pass 换不了。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from deepseek_export.checkpoint.recipe import packed_rows
from deepseek_export.checkpoint.weight_only import KERNEL_SCALE, BlockFormat, Quantization
from deepseek_export.ops.table import MLA_ATTENTION, OPS, SPARSE_MLA_ATTENTION
from deepseek_export.passes.base import GraphModule, Pass, read_from
from deepseek_export.passes.ort_moe import scope
from deepseek_export.records import PassResult, Refusal

_WEIGHT, _WIDE = "w_kv_b", "kv_b/float32"
_OPS = (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name)


class QuantizeKvBWeightsPass(Pass):
    """把 ``MlaAttention`` 的 w_kv_b 换成 int8 的行，见 :mod:`~deepseek_export.ops.weight_rows`。

    改写：

    1. ``MlaAttention`` 的 w_kv_b 是 float32 权重输入：换成码与 scale 在一起的行，函数体的开头还原成 float32。C++ 算子库直接读它；没有库时
       ONNX Runtime 在建会话时把还原折叠掉。int4 的 bundle 也用 int8：它只占一步的几个百分点，误差却经过 softmax。

    不改写：

    2. 权重或所在模块在 ``keep`` 里：用户要的，不算拒绝；
    3. 同一张图里有要保留的：函数体只有一份，认不了两种写法，其余的拒绝，由后面的 pass 存成 bfloat16；
    4. r 不是 block 的倍数：拒绝，同上。

    名字：新权重叫 ``{w}.rows``。
    """

    name: ClassVar[str] = "quantize-kv-b-weights"

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def call(self, module: GraphModule) -> PassResult:
        """见类说明。"""
        nodes = float_kv_b(module)
        kept = [node for node in nodes if self.quantization.keeps(scope(node), weight_of(node).name)]
        others = [node for node in nodes if not any(node is one for one in kept)]
        problem = self._problem(module, kept)
        if problem is not None:
            refused = [Refusal(node=node.name, reason=problem[0], value=problem[1]) for node in others]
            return PassResult(name=self.name, changed=False, count=0, refused=tuple(refused), kept=len(kept))
        form = BlockFormat(kind="int8", block=self.quantization.block, scale=KERNEL_SCALE)
        for node in others:
            weight = weight_of(node)
            rows = module.add_weight(
                f"{weight.name}.rows", packed_rows(module.weights[weight.name], form), before=weight
            )
            node.inputs[OPS[node.op].find(_WEIGHT)[1]] = rows
            module.quantized.add(weight.name)
        for op in {node.op for node in others}:
            width = module.config.kv_lora_rank
            module.functions[op] = _decoded(module.functions[op], width, form.block)
        return PassResult(name=self.name, changed=bool(others), count=len(others), kept=len(kept))

    def _problem(self, module: GraphModule, kept: Sequence[gs.Node]) -> tuple[str, str] | None:
        # 情形 3。
        if kept:
            return (
                "同一张图里有的 w_kv_b 要保持浮点，其余的存成 bfloat16",
                f"保留的 {weight_of(kept[0]).name}",
            )
        # 情形 4。
        width, block = module.config.kv_lora_rank, self.quantization.block
        if width % block:
            return (
                f"kv_lora_rank 不是 block（{block}）的倍数，w_kv_b 存成 bfloat16",
                f"kv_lora_rank = {width}",
            )
        return None


def float_kv_b(module: GraphModule) -> list[gs.Node]:
    """w_kv_b 还是 float32 的注意力节点。"""
    nodes = [node for op in _OPS for node in module.find(op)]
    recipes = [module.weights.get(weight_of(node).name) for node in nodes]
    return [
        node
        for node, recipe in zip(nodes, recipes, strict=True)
        if recipe is not None and recipe.dtype == "float32"
    ]


def weight_of(node: gs.Node) -> gs.Variable:
    """注意力节点的 w_kv_b。"""
    return node.inputs[OPS[node.op].find(_WEIGHT)[1]]


def _decoded(body: onnx.FunctionProto, width: int, block: int) -> onnx.FunctionProto:
    """函数体的开头把 w_kv_b 的行还原成 float32。"""
    wide = onnx.FunctionProto()
    wide.CopyFrom(body)  # 函数体由捕获缓存共享，改副本
    for node in wide.node:
        read_from(node, _WEIGHT, _WIDE)
    nodes = [*_decoding(width, block), *wide.node]
    del wide.node[:]
    wide.node.extend(nodes)
    return wide


def _decoding(width: int, block: int) -> list[onnx.NodeProto]:
    """一行的码乘所在块的 scale。float16 的两个字节查表还原：高字节给出阶码与尾数的高两位，低字节（负的下标从末尾数）是尾数的其余。"""
    high = np.arange(128)
    step = np.exp2(np.maximum(high // 4, 1) - 25.0)
    base = (high % 4 * 256 + np.where(high >= 4, 1024, 0)) * step
    made: list[onnx.NodeProto] = []

    def constant(name: str, value: np.ndarray) -> str:
        made.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name)))
        return name

    def node(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        made.append(helper.make_node(op, inputs, [f"kv_b/{name}"], name=f"kv_b/{op}/{name}", **attributes))
        return f"kv_b/{name}"

    def numbers(name: str, *values: int) -> str:
        return constant(f"kv_b/{name}", np.array(values, np.int64))

    ends = numbers("zero", 0), numbers("width", width), numbers("end", 1 << 31), numbers("columns", 1)
    zero, middle, end, columns = ends
    codes = node("Slice", [_WEIGHT, zero, middle, columns], "codes")
    blocks = node("Reshape", [codes, numbers("blocks_shape", -1, width // block, block)], "blocks")
    values = node("Cast", [blocks], "values", to=TensorProto.FLOAT)
    packed = node("Slice", [_WEIGHT, middle, end, columns], "packed")
    pairs = node("Reshape", [packed, numbers("pairs_shape", -1, width // block, 2)], "pairs")
    bytes_ = node("Cast", [pairs], "bytes", to=TensorProto.INT64)
    low, high_byte = (
        node("Gather", [bytes_, numbers(f"{name}_index", index)], name, axis=2)
        for name, index in (("low", 0), ("high", 1))
    )
    tables = {
        "low_values": np.arange(256.0),
        "base_values": base,
        "step_values": step,
    }
    named = {name: constant(f"kv_b/{name}", table.astype(np.float32)) for name, table in tables.items()}
    fraction = node("Gather", [named["low_values"], low], "fraction")
    start = node("Gather", [named["base_values"], high_byte], "start")
    unit = node("Gather", [named["step_values"], high_byte], "unit")
    scales = node("Add", [start, node("Mul", [fraction, unit], "rest")], "scales")
    scaled = node("Mul", [values, scales], "scaled")
    made.append(
        helper.make_node(
            "Reshape", [scaled, numbers("shape", -1, width)], [_WIDE], name="kv_b/Reshape/float32"
        )
    )
    return made
