"""TensorRT 目标的 bundle 里的一张图 → 交给 TensorRT 解析的 ONNX：图已经下沉好，只差缓存容量，与 prefill 看几行缓存由谁说。

bundle 的图里那是 ``max(past_lens) + S``，由设备上的值算出；TensorRT 的形状只能由主机知道的算出，所以引擎另有一个输入 :data:`KEY_SPAN`，只看它有
几列，内容不读。
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deepseek_export.ops.table import DOMAIN, OPS
from deepseek_export.passes.lower_mla_to_tensorrt import KEY_COUNT, NATIVE_ATTENTION
from deepseek_export.records import BEST_ID, BEST_LOGIT

#: 引擎的输入 ``[B, P]`` int8：这一次 prefill 看缓存的前 P 行，P 不小于 ``max(past_lens) + S``。
KEY_SPAN, KEY_SPAN_DIMS = "key_span", ("B", "P")


@dataclass(frozen=True)
class EngineGraph:
    """一张可以解析的图。

    Attributes:
        model: 权重是外部数据，位置相对 ONNX 文件；缓存容量 T 已是常数。
        plugins: 插件节点名 → 算子名。
        attentions: prefill 路径上原生注意力的节点名，每层 MLA 一个；没有 prefill 路径时为空。
        key_span: 有没有 :data:`KEY_SPAN` 这个输入。
        best: 有没有 ``best_id``、``best_logit`` 这两个输出。
    """

    model: onnx.ModelProto
    plugins: dict[str, str]
    attentions: list[str]
    key_span: bool
    best: bool


def engine_graph(path: Path, capacity: int) -> EngineGraph:
    """读 bundle 的一张图，把缓存容量写死，看几行缓存改由输入给出，另给出选好的 token。

    Args:
        path: 图的文件；它的 bundle 先过 :func:`~deepseek_export.engine.derived.check_buildable`。
        capacity: 缓存容量 T。
    """
    model = onnx.load(path, load_external_data=False)
    fix_capacity(model, capacity)
    key_span, best = take_key_span(model), give_best(model)
    del model.graph.value_info[:]  # 中间值的形状由 TensorRT 重新推导
    nodes = model.graph.node
    plugins = {node.name: node.op_type for node in nodes if node.domain == DOMAIN}
    attentions = [node.name for node in nodes if node.op_type == NATIVE_ATTENTION]
    return EngineGraph(model, plugins, attentions, key_span, best)


def shared_outputs(graph: onnx.GraphProto) -> dict[str, str]:
    """就地改写的输出 → 与它同一块内存的输入：缓存的写入，原生的与插件的。"""
    found = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
    for node in graph.node:
        spec = OPS.get(node.op_type) if node.domain == DOMAIN else None
        found |= {
            node.output[output]: node.input[given] for output, given in (spec.aliased() if spec else ())
        }
    return found


def fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """图的输入输出里缓存的 T 换成常数。"""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "T":
                dim.dim_value = capacity


def take_key_span(model: onnx.ModelProto) -> bool:
    """prefill 看几行缓存改由输入 :data:`KEY_SPAN` 的形状给出，就地改；图里没有 prefill 路径就什么也不做。

    Returns:
        有没有加上这个输入。
    """
    graph = model.graph
    counts = [node for node in graph.node if node.name.endswith(f"/{KEY_COUNT}")]
    if not counts:
        return False
    values = {node.input[0] for node in counts}  # max(past_lens)，只有它读
    for node in counts:
        shape = helper.make_node("Shape", [KEY_SPAN], list(node.output), node.name, start=1, end=2)
        node.CopyFrom(shape)
    kept = [node for node in graph.node if not values.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    graph.input.append(helper.make_tensor_value_info(KEY_SPAN, TensorProto.INT8, list(KEY_SPAN_DIMS)))
    return True


def give_best(model: onnx.ModelProto) -> bool:
    """主模型另给出每个位置最大的 token 与它的 logit，就地加：贪心的一步只取回这两个，不取 logits。

    logits 里有 NaN 的，给出的 logit 是无穷大，会话照样拒绝：编译出来的 TopK 怎么排 NaN 没有说法。输出就是 TopK 的 ``[B, L, 1]`` 与 int64，不另起一层
    改形状、改类型。草稿模型已有 ``draft_id``，流水线里不是最后的 stage 没有 logits，都不加。

    Returns:
        加了没有。
    """
    graph = model.graph
    names = {value.name for value in graph.output}
    if "logits" not in names or "draft_id" in names:
        return False
    constants = (("one", np.ones(1, np.int64)), ("infinity", np.array(np.inf, np.float32)))
    graph.initializer.extend(numpy_helper.from_array(value, f"best/{name}") for name, value in constants)
    steps: tuple[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, int]], ...] = (
        ("Cast", ("logits",), ("best/wide",), {"to": TensorProto.FLOAT}),
        ("IsNaN", ("best/wide",), ("best/nan",), {}),
        ("Where", ("best/nan", "best/infinity", "best/wide"), ("best/ranked",), {}),
        ("TopK", ("best/ranked", "best/one"), (BEST_LOGIT, BEST_ID), {"axis": -1}),
    )
    for op, inputs, outputs, attributes in steps:
        node = helper.make_node(op, inputs, outputs, name=outputs[0])
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        graph.node.append(node)
    for name, dtype in ((BEST_ID, TensorProto.INT64), (BEST_LOGIT, TensorProto.FLOAT)):
        graph.output.append(helper.make_tensor_value_info(name, dtype, ["B", "L", 1]))
    return True
