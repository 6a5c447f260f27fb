"""在层的边上切开主模型的图：一段连着的层成为一张图，``hidden_in`` 进、``hidden_out`` 出。

做法是从这一段的输出往回走，走到前一段的输出为止。走到的节点归这一段，所以每段只带自己的权重；RoPE 的角度由 ``past_lens`` 与 S 算出，各段各算一份。
图里除了 S 以外用到 ``input_ids`` 的只有词嵌入，后面的段于是不要 token。
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import helper

from deepseek_export.bundle.graph import external_location
from deepseek_export.capture import names
from deepseek_export.errors import DsxError

#: 边上的两个端口，各 [B, S, D]，模型的 dtype。
HIDDEN_IN, HIDDEN_OUT = "hidden_in", "hidden_out"
#: ONNX 里记着 stage 编号的配置叫什么。
CONFIGURATION = "dsx-pipeline"


class LayerCutter:
    """切一张主模型的图。

    Args:
        model: 主模型，权重是外部数据；不会被修改。
        layers: 层数。
    """

    def __init__(self, model: onnx.ModelProto, layers: int) -> None:
        self._model, self._layers = model, layers
        graph = model.graph
        self._producer = {
            name: index for index, node in enumerate(graph.node) for name in node.output if name
        }
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs = {value.name: value for value in graph.input}
        self._outputs = {value.name: value for value in graph.output}
        self._infos = {value.name: value for value in graph.value_info}
        self._whole = {name for name in self._outputs if _layer_of(name) is None}

    def weights(self, begin: int, end: int) -> list[str]:
        """``[begin, end)`` 这几层用到的外部权重，次序同图；首段含词嵌入，末段含输出头。"""
        _, used = self._walk(begin, end)
        return [
            name for name, tensor in self._initializers.items() if name in used and external_location(tensor)
        ]

    def cut(self, begin: int, end: int) -> onnx.ModelProto:
        """``[begin, end)`` 这几层的图。

        Raises:
            DsxError: ``DSX-E746``，这条边上除了 hidden 还有别的值要过。
        """
        indices, used = self._walk(begin, end)
        graph = self._model.graph
        rename = {}
        if begin:
            rename[names.layer_output(begin - 1)] = HIDDEN_IN
        if end < self._layers:
            rename[names.layer_output(end - 1)] = HIDDEN_OUT
        model = onnx.ModelProto()
        for field in ("ir_version", "producer_name", "producer_version", "doc_string"):
            setattr(model, field, getattr(self._model, field))
        model.opset_import.extend(self._model.opset_import)
        model.metadata_props.extend(self._model.metadata_props)
        made = model.graph
        made.name = graph.name
        for index in indices:
            node = made.node.add()
            node.CopyFrom(graph.node[index])
            if begin and node.op_type == "Shape" and list(node.input) == [names.INPUT_IDS]:
                node.input[0] = HIDDEN_IN
            for ports in (node.input, node.output):
                for place, name in enumerate(ports):
                    ports[place] = rename.get(name, name)
        if begin:
            made.input.append(self._edge(begin - 1, HIDDEN_IN))
        made.input.extend(value for name, value in self._inputs.items() if name in used)
        kept = {value for node in made.node for value in node.output}
        if end < self._layers:
            made.output.append(self._edge(end - 1, HIDDEN_OUT))
        made.output.extend(value for name, value in self._outputs.items() if name in kept)
        made.initializer.extend(tensor for name, tensor in self._initializers.items() if name in used)
        declared = {value.name for value in (*made.input, *made.output)}
        made.value_info.extend(
            info for name, info in self._infos.items() if name in kept - declared and name not in rename
        )
        model.functions.extend(_called(self._model.functions, made.node))
        return model

    def _walk(self, begin: int, end: int) -> tuple[list[int], set[str]]:
        """这一段的节点（原来的次序），与它们用到的图输入、initializer。"""
        graph = self._model.graph
        stop = names.layer_output(begin - 1) if begin else None
        todo = [
            name for name in self._outputs if (layer := _layer_of(name)) is not None and begin <= layer < end
        ]
        todo += sorted(self._whole) if end == self._layers else [names.layer_output(end - 1)]
        found: set[int] = set()
        used: set[str] = set()
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if not name or name == stop or name in seen:
                continue
            seen.add(name)
            index = self._producer.get(name)
            if index is None:
                used.add(name)
                continue
            if index not in found:
                found.add(index)
                node = graph.node[index]
                if begin and _only_sizes(node):
                    continue
                todo += _reads(node)
        foreign = [
            name for name in used if (layer := _layer_of(name)) is not None and not begin <= layer < end
        ]
        if (begin and names.INPUT_IDS in used) or foreign:
            crossing = sorted({*foreign, *({names.INPUT_IDS} & used if begin else ())})
            raise DsxError(
                "DSX-E746",
                f"第 {begin - 1} 与第 {begin} 层之间除了 hidden，还有别的要过：{'、'.join(crossing[:4])}",
                "换一处切，或用当前的 dsx 重新导出",
            )
        return sorted(found), used

    def _edge(self, layer: int, name: str) -> onnx.ValueInfoProto:
        """边上的端口：[B, S, D]，类型同最后的 hidden。"""
        value = onnx.ValueInfoProto()
        value.CopyFrom(self._outputs[names.HIDDEN])
        value.name = name
        return value


def mark_stage(model: onnx.ModelProto, index: int, count: int) -> None:
    """按 ONNX（IR 11 起）的写法记下每个节点在第几个 stage。"""
    model.configuration.add(name=CONFIGURATION, num_devices=count)
    for node in model.graph.node:
        node.device_configurations.add(configuration_id=CONFIGURATION, pipeline_stage=index)


def _layer_of(name: str) -> int | None:
    """缓存的输入输出（``kv_cache.3``、``kv_cache_out.3``）是哪一层的；别的端口为 ``None``。"""
    stem, _, layer = name.partition(".")
    return int(layer) if layer.isdigit() and "cache" in stem else None


def _only_sizes(node: onnx.NodeProto) -> bool:
    """只看 token 的 B、S：换成看 hidden 的，结果一样。"""
    if node.op_type != "Shape" or list(node.input) != [names.INPUT_IDS]:
        return False
    ends = [helper.get_attribute_value(one) for one in node.attribute if one.name == "end"]
    return bool(ends) and 0 <= ends[0] <= 2


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """节点读的值，含子图里从外面取的。"""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = {name for one in attribute.g.node for name in one.output}
            inner |= {value.name for value in (*attribute.g.input, *attribute.g.initializer)}
            for one in attribute.g.node:
                yield from (name for name in _reads(one) if name not in inner)
            yield from (value.name for value in attribute.g.output if value.name not in inner)


def _called(
    functions: Sequence[onnx.FunctionProto], nodes: Iterable[onnx.NodeProto]
) -> list[onnx.FunctionProto]:
    """用得着的函数体，连同函数体里又用到的。"""
    bodies = {(function.domain, function.name): function for function in functions}
    todo, needed = list(nodes), set()
    while todo:
        node = todo.pop()
        todo += [
            inner for attribute in node.attribute if attribute.HasField("g") for inner in attribute.g.node
        ]
        key = (node.domain, node.op_type)
        if key in bodies and key not in needed:
            needed.add(key)
            todo += bodies[key].node
    return [function for key, function in bodies.items() if key in needed]
