"""TensorRT 目标的 bundle 里的一张图 → 交给 TensorRT 解析的 ONNX：图已经下沉好，只差缓存容量，与 prefill 看几行缓存由谁说。

bundle 的图里那是 ``max(past_lens) + S``，由设备上的值算出；TensorRT 的形状只能由主机知道的算出，所以引擎另有一个输入 :data:`KEY_SPAN`，只看它有
几列，内容不读。
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from deepseek_export.ops.table import DOMAIN
from deepseek_export.passes.lower_mla_to_tensorrt import KEY_COUNT, NATIVE_ATTENTION

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
    """

    model: onnx.ModelProto
    plugins: dict[str, str]
    attentions: list[str]
    key_span: bool


def engine_graph(path: Path, capacity: int) -> EngineGraph:
    """读 bundle 的一张图，把缓存容量写死，看几行缓存改由输入给出。

    Args:
        path: 图的文件；它的 bundle 先过 :func:`~deepseek_export.engine.derived.check_buildable`。
        capacity: 缓存容量 T。
    """
    model = onnx.load(path, load_external_data=False)
    fix_capacity(model, capacity)
    key_span = take_key_span(model)
    del model.graph.value_info[:]  # 中间值的形状由 TensorRT 重新推导
    nodes = model.graph.node
    plugins = {node.name: node.op_type for node in nodes if node.domain == DOMAIN}
    attentions = [node.name for node in nodes if node.op_type == NATIVE_ATTENTION]
    return EngineGraph(model, plugins, attentions, key_span)


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
