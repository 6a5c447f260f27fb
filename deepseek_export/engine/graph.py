"""TensorRT 目标的 bundle 里的一张图 → 交给 TensorRT 解析的 ONNX：图已经下沉好，只差缓存容量。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from deepseek_export.ops.table import DOMAIN
from deepseek_export.passes.lower_mla_to_tensorrt import NATIVE_ATTENTION


@dataclass(frozen=True)
class EngineGraph:
    """一张可以解析的图。

    Attributes:
        model: 权重是外部数据，位置相对 ONNX 文件；缓存容量 T 已是常数。
        plugins: 插件节点名 → 算子名。
        attentions: prefill 路径上原生注意力的节点名，每层 MLA 一个；没有 prefill 路径时为空。
    """

    model: onnx.ModelProto
    plugins: dict[str, str]
    attentions: list[str]


def engine_graph(path: Path, capacity: int) -> EngineGraph:
    """读 bundle 的一张图，把缓存容量写死。

    Args:
        path: 图的文件；它的 bundle 先过 :func:`~deepseek_export.engine.derived.check_buildable`。
        capacity: 缓存容量 T。
    """
    model = onnx.load(path, load_external_data=False)
    fix_capacity(model, capacity)
    del model.graph.value_info[:]  # 中间值的形状由 TensorRT 重新推导
    nodes = model.graph.node
    plugins = {node.name: node.op_type for node in nodes if node.domain == DOMAIN}
    return EngineGraph(model, plugins, [node.name for node in nodes if node.op_type == NATIVE_ATTENTION])


def fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """图的输入输出里缓存的 T 换成常数。"""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "T":
                dim.dim_value = capacity
