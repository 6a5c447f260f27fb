"""``dsx compare --backend trt``：为断开的图就地建一个引擎，逐块跑。

它不是 ``engines/`` 里那个引擎：块的边界在那里已经融掉了。但下沉、插件、TensorRT 的编译器都是同一份，形状固定在这次比较的输入上。
整个模型、那个引擎本身，用 ``dsx verify --backend trt`` 比。
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from deepseek_export.backend.base import Arrays, CutRunner
from deepseek_export.backend.tensorrt.cuda import Buffer, require_gpu
from deepseek_export.backend.tensorrt.engine import LoadedEngine, find_engine
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.engine.build import build_engine_bytes, check_plugins
from deepseek_export.engine.derived import check_buildable
from deepseek_export.engine.flavour import FLAVOURS, Flavour, load
from deepseek_export.engine.graph import KEY_SPAN, fix_capacity, shared_outputs, take_key_span
from deepseek_export.engine.layers import EngineLayer, parse_layers
from deepseek_export.engine.shapes import Range, has_prefill
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import DOMAIN
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS
from deepseek_export.progress import Progress

#: 建引擎用的图，与断开的图在同一个目录、用同一份权重。
ENGINE_GRAPH = "engine.onnx"


def cut_runner(bundle: Bundle) -> CutRunner:
    """断开的是 TensorRT 解析的那张图：缓存容量定成了常数。

    Raises:
        DsxError: ``DSX-E918`` / ``DSX-E913`` / ``DSX-E920`` / ``DSX-E917`` 这台机器、这个 bundle 上用不了 TensorRT；``DSX-E614`` 这种方案或
            dtype 不能逐块比。
    """
    sm = require_gpu()
    check_buildable(bundle)
    reason = None
    if not has_prefill(bundle.manifest.profile):
        reason = f"mla.form=absorb 的插件核一次至多 {MAX_DECODE_TOKENS} 个 token，逐块比较的 prefill 更长"
    elif "bfloat16" in (bundle.manifest.dtype, bundle.manifest.cache.dtype):
        reason = "Polygraphy 的格式存不了 bfloat16，而 TensorRT 要缓存直接是图的输入，不能经过转换"
    if reason is not None:
        todo = "去掉 trt；整个模型用 dsx verify --backend trt 比"
        raise DsxError("DSX-E614", f"后端 trt：{reason}", todo)
    flavour = FLAVOURS[find_engine(bundle, sm)[1].flavour]

    def parsed(entry: GraphEntry, capacity: int) -> onnx.ModelProto:
        model = onnx.load(bundle.path / entry.file, load_external_data=False)
        fix_capacity(model, capacity)
        return model

    return CutRunner(parsed, CutEngines(flavour, sm), ".trt")


class CutEngines:
    """把一张断开的图建成引擎，每次前向一个优化配置。

    Args:
        flavour: 用哪种 TensorRT。
        sm: 当前 GPU。
    """

    def __init__(self, flavour: Flavour, sm: int) -> None:
        self._flavour, self._sm = flavour, sm

    def __call__(self, model: Path, feeds: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
        """建引擎并执行。

        Raises:
            DsxError: ``DSX-E914`` TensorRT 报错；``DSX-E915`` 有插件没有留在引擎里；``DSX-E916`` 插件出错。
        """
        content, layers = self.build(model, feeds)
        loaded = LoadedEngine(self._flavour, self._sm, content, layers, str(model))
        path = model.with_name(ENGINE_GRAPH)
        graph = onnx.load(path, load_external_data=False).graph
        return [
            _execute(loaded, name, graph, feed)
            for name, feed in zip(layers, _with_key_span(graph, feeds), strict=True)
        ]

    def build(self, model: Path, feeds: Sequence[Arrays]) -> tuple[memoryview, dict[str, list[EngineLayer]]]:
        """只建引擎；不需要 GPU（发行允许的话）。

        Returns:
            引擎，与每个优化配置的层；配置的名字是第几次前向。
        """
        graph = onnx.load(model, load_external_data=False)
        take_key_span(graph)
        fixed = fix_shapes(graph, _with_key_span(graph.graph, feeds))
        profiles = {str(i): ranges for i, ranges in enumerate(fixed)}
        path = model.with_name(ENGINE_GRAPH)
        onnx.save(graph, path)
        content, text = build_engine_bytes(
            load(self._flavour), self._flavour, path, self._sm, profiles, Progress()
        )
        plugins = {node.name: node.op_type for node in graph.graph.node if node.domain == DOMAIN}
        layers = parse_layers(text, list(profiles), plugins)
        check_plugins(path.name, [layer for found in layers.values() for layer in found], plugins)
        return content, layers


def _with_key_span(graph: onnx.GraphProto, feeds: Sequence[Arrays]) -> Sequence[Arrays]:
    """图要 :data:`KEY_SPAN` 的，每次前向都看整个缓存：这里的容量本来就刚好够用。"""
    if all(value.name != KEY_SPAN for value in graph.input):
        return feeds
    caches = [value.name for value in graph.input if "cache" in value.name]
    spans = [feed[caches[0]].shape for feed in feeds]
    return [
        {**feed, KEY_SPAN: np.zeros((shape[0], shape[2]), np.int8)}
        for feed, shape in zip(feeds, spans, strict=True)
    ]


def fix_shapes(model: onnx.ModelProto, feeds: Sequence[Arrays]) -> list[dict[str, Range]]:
    """按这几次前向的输入写死形状：各次相同的维是常数，不同的维起一个名字。

    断开处的值多半没有推导出形状；输入的形状写全之后，其余的由 TensorRT 自己推导。

    Returns:
        每次前向一份：维的名字 → 最小、最优、最大值。
    """
    found: dict[tuple[int, ...], str] = {}
    for value in model.graph.input:
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for sizes in zip(*(feed[value.name].shape for feed in feeds), strict=True):
            if len(set(sizes)) == 1:
                shape.dim.add(dim_value=sizes[0])
            else:
                shape.dim.add(dim_param=found.setdefault(sizes, f"d{len(found)}"))
    del model.graph.value_info[:]
    return [{name: (sizes[i],) * 3 for sizes, name in found.items()} for i in range(len(feeds))]


def _execute(engine: LoadedEngine, name: str, model: onnx.GraphProto, feed: Arrays) -> dict[str, np.ndarray]:
    """一次前向。缓存写入的输出与输入是同一块内存。"""
    cuda, context = engine.cuda, engine.contexts[name]
    shared = shared_outputs(model)
    buffers: dict[str, Buffer] = {}
    for port, array in feed.items():
        buffers[port] = Buffer(cuda, array.dtype)
        buffers[port].reshape(array.shape)
        buffers[port].send(array)
        context.set_input_shape(port, array.shape)
    for value in model.output:
        if shared.get(value.name) in feed:
            buffers[value.name] = buffers[shared[value.name]]
        else:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            buffers[value.name] = Buffer(cuda, dtype)
            buffers[value.name].reshape(tuple(context.get_tensor_shape(value.name)))
    for port, buffer in buffers.items():
        context.set_tensor_address(port, buffer.address)
    engine.ready(context)
    engine.execute(context, f"第 {name} 次前向")
    outputs = {value.name: buffers[value.name] for value in model.output}
    for buffer in outputs.values():
        buffer.fetch()
    cuda.synchronize()
    return {port: buffer.array for port, buffer in outputs.items()}
