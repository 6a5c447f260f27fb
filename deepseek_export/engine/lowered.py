"""bundle → 给 TensorRT 解析的 ONNX：portable 的在这里下沉，TensorRT 目标的已经下沉过。"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.graph import Slot, bind_external
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.capture import CapturedModel
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops.table import DOMAIN
from deepseek_export.passes import lower
from deepseek_export.passes.lower_mla_to_tensorrt import NATIVE_ATTENTION
from deepseek_export.profile import OptimizationProfile


@dataclass(frozen=True)
class LoweredGraph:
    """一张下沉好的图。

    Attributes:
        entry: manifest 里的说明。
        model: 权重是外部数据，位置相对 ONNX 文件；缓存容量 T 已是常数。
        plugins: 插件节点名 → 算子名。
        attentions: prefill 路径上原生注意力的节点名，每层 MLA 一个；没有 prefill 路径时为空。
    """

    entry: GraphEntry
    model: onnx.ModelProto
    plugins: dict[str, str]
    attentions: list[str]


def has_prefill(profile: OptimizationProfile) -> bool:
    """有没有 prefill 路径；``mla.form=absorb`` 只有插件核，一次至多 8 个 token。"""
    return not (profile.mla.enabled and profile.mla.form == "absorb")


def lowered_graph(bundle: Bundle, entry: GraphEntry, target: str, capacity: int) -> LoweredGraph:
    """取出 bundle 的一张图，需要时下沉。

    Args:
        bundle: 先过 :func:`~deepseek_export.engine.derived.check_buildable`。
        entry: 哪张图。
        target: 下沉到 ``tensorrt`` 还是 ``tensorrt-rtx``。
        capacity: 缓存容量 T。

    Raises:
        DsxError: ``DSX-E320`` 等，见 :func:`~deepseek_export.passes.lower`。
    """
    manifest = bundle.manifest
    model = onnx.load(bundle.path / entry.file, load_external_data=False)
    if manifest.target == "portable":
        slots = _slots(model)
        captured = _captured(bundle, entry, model, set(slots))
        lowered = lower(captured, manifest.model, manifest.profile, manifest.dtype, target)
        model = bind_external(lowered.proto, slots)
    _fix_capacity(model, capacity)
    nodes = model.graph.node
    plugins = {node.name: node.op_type for node in nodes if node.domain == DOMAIN}
    return LoweredGraph(
        entry, model, plugins, [node.name for node in nodes if node.op_type == NATIVE_ATTENTION]
    )


def _slots(model: onnx.ModelProto) -> dict[str, Slot]:
    """外部权重在文件里的位置。"""
    slots = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = {entry.key: entry.value for entry in tensor.external_data}
            slots[tensor.name] = Slot(data["location"], int(data["offset"]), int(data["length"]))
    return slots


def _captured(bundle: Bundle, entry: GraphEntry, model: onnx.ModelProto, weights: set[str]) -> CapturedModel:
    """portable 的图就是捕获的结果加函数体：把外部权重变回输入。"""
    manifest, graph = bundle.manifest, model.graph
    recipes = {name: recipe for name, recipe in manifest.weights.recipes.items() if name in weights}
    for name, recipe in recipes.items():
        kind = DTYPES[recipe.dtype].onnx
        graph.input.append(helper.make_tensor_value_info(name, kind, list(recipe.shape)))
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    functions = {function.name: function for function in model.functions}
    del model.functions[:]
    mtp = manifest.profile.mtp
    return CapturedModel(
        model,
        functions,
        recipes,
        list(entry.sites),
        entry.role,
        tuple(entry.layers),
        mtp.verify if mtp.enabled and entry.role == "main" else None,
    )


def _fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """缓存的 T 换成常数；中间值的形状由 TensorRT 重新推导。"""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "T":
                dim.dim_value = capacity
    del graph.value_info[:]
