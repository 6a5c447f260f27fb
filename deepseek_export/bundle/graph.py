"""写盘时对 ONNX 图做的事：把权重输入换成外部数据、检查合法性、数出 float32 孤岛。"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import inliner

from deepseek_export.bundle.manifest import ValueEntry
from deepseek_export.version import __version__


@dataclass(frozen=True)
class Slot:
    """一个 initializer 的内容在哪里。

    Attributes:
        location: 文件，相对 ONNX 文件的路径。
        offset, length: 文件里的位置（字节）。
    """

    location: str
    offset: int
    length: int


def bind_external(proto: onnx.ModelProto, slots: Mapping[str, Slot]) -> onnx.ModelProto:
    """把权重输入换成外部数据的 initializer。

    Args:
        proto: 权重是输入的模型；不会被修改。
        slots: 权重名 → 内容的位置。
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    kept = [value for value in model.graph.input if value.name not in slots]
    for value in model.graph.input:
        if value.name not in slots:
            continue
        kind = value.type.tensor_type
        tensor = model.graph.initializer.add(name=value.name, data_type=kind.elem_type)
        tensor.dims.extend(dim.dim_value for dim in kind.shape.dim)
        point_at(tensor, slots[value.name])
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def label(model: onnx.ModelProto, title: str, facts: Mapping[str, str]) -> None:
    """写上 Netron 这样的工具会显示的：谁产生的、是什么、几样要紧的事；只由模型与设置决定，没有时间与路径。

    Args:
        model: 要写盘的模型；已有的 ``metadata_props`` 保留。
        title: 一句话，写成 ``doc_string``。
        facts: ``metadata_props``，键加上 ``dsx.``。
    """
    model.producer_version, model.doc_string = __version__, title
    kept = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, kept | {f"dsx.{key}": value for key, value in facts.items()})


def point_at(tensor: onnx.TensorProto, slot: Slot) -> None:
    """让 initializer 的内容取自 ``slot``。"""
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in vars(slot).items():
        tensor.external_data.add(key=key, value=str(value))


def value_entry(value: onnx.ValueInfoProto) -> ValueEntry:
    """图的一个输入或输出，写进 manifest 的样子。"""
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return ValueEntry(
        name=value.name, dtype=dtype, shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    )


def external_location(tensor: onnx.TensorProto) -> str | None:
    """外部数据的文件，相对 ONNX 文件的路径；不是外部数据则为 ``None``。"""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def check_onnx(path: Path) -> None:
    """``onnx.checker``，带完整形状推导。

    checker 只看外部数据的文件在不在，但把有多个硬链接的当作攻击来拒绝，而按引用的权重正是硬链接；所以在临时目录里用同名的空文件检查。
    """
    graph = onnx.load(path, load_external_data=False).graph
    locations = {location for tensor in graph.initializer if (location := external_location(tensor))}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".check-") as scratch:
        for location in locations:
            stand_in = Path(scratch) / location
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.touch()
        shutil.copyfile(path, Path(scratch) / path.name)
        onnx.checker.check_model(str(Path(scratch) / path.name), full_check=True)


def float32_islands(model: onnx.ModelProto) -> dict[str, list[str]]:
    """半精度模型里以 float32 计算的节点：``op_type`` → 节点名（函数体先内联，含 ``Loop``/``If`` 里的）。

    ``RMSNormalization`` 输入输出是 float16，但 ``stash_type=1`` 使它内部用 float32，也算。
    """
    inlined = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    found: dict[str, list[str]] = defaultdict(list)
    _find_islands(inlined.graph, found)
    return dict(sorted(found.items()))


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


def _find_islands(graph: onnx.GraphProto, found: dict[str, list[str]]) -> None:
    values = (*graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in graph.node:
        if node.op_type == "RMSNormalization" or (
            node.op_type not in _MOVES and any(types.get(o) == onnx.TensorProto.FLOAT for o in node.output)
        ):
            found[node.op_type].append(node.name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _find_islands(attribute.g, found)
