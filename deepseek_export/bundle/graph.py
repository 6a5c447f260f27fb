"""写盘之前对 ONNX 图做的两件事：把权重输入换成外部数据，数出 float32 孤岛。"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import inliner

from deepseek_export.bundle.packed import Slot


def bind_external(proto: onnx.ModelProto, slots: dict[str, Slot], location: str) -> onnx.ModelProto:
    """把权重输入换成指向权重文件的 initializer。

    Args:
        proto: 权重是输入的模型；不会被修改。
        slots: 权重名 → 文件里的位置。
        location: 相对 ONNX 文件的路径。
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    kept = [value for value in model.graph.input if value.name not in slots]
    for value in model.graph.input:
        if value.name not in slots:
            continue
        slot, kind = slots[value.name], value.type.tensor_type
        tensor = model.graph.initializer.add(
            name=value.name, data_type=kind.elem_type, data_location=onnx.TensorProto.EXTERNAL
        )
        tensor.dims.extend(dim.dim_value for dim in kind.shape.dim)
        for key, text in (("location", location), ("offset", str(slot.offset)), ("length", str(slot.length))):
            tensor.external_data.add(key=key, value=text)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def float32_islands(model: onnx.ModelProto) -> dict[str, int]:
    """float16 模型里以 float32 计算的节点：``op_type`` → 个数（函数体先内联再数，含 ``Loop``/``If`` 里的）。

    ``RMSNormalization`` 输入输出是 float16，但 ``stash_type=1`` 使它内部用 float32，也算。
    """
    inlined = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    counts: Counter[str] = Counter()
    _count_islands(inlined.graph, counts)
    return dict(sorted(counts.items()))


#: 只搬运、改形状或产生常量的算子，不算计算。
_MOVES = {
    *(
        "Cast",
        "Constant",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Concat",
        "Split",
        "Slice",
        "Gather",
    ),
    *("GatherElements", "Identity", "Expand", "Loop", "If", "ScatterND", "Where", "Shape", "Range"),
}


def _count_islands(graph: onnx.GraphProto, counts: Counter[str]) -> None:
    values = (*graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in graph.node:
        if node.op_type == "RMSNormalization" or (
            node.op_type not in _MOVES and any(types.get(o) == onnx.TensorProto.FLOAT for o in node.output)
        ):
            counts[node.op_type] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _count_islands(attribute.g, counts)
