"""引擎的层：每层从哪些 ONNX 节点来，哪些是插件，哪些融在了一起。"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

_LINE = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w+),(?P<rest>.*)$")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
#: 编译器自己加的：优化配置、重名编号、图的编号与层号。
_DECORATION = re.compile(r" \[profile \d+\]|(_U\d+)?_myl\d+_\d+$")

#: 插件层的种类：RTX 与 TensorRT 11 是前一个，TensorRT 10 的 inspector 是后一个。
_PLUGIN_KINDS = {"custom_layer", "PluginV3"}
#: 原生融合注意力的层名里都有它，例如 ``_gemm_mha_v2``。
_FUSED_ATTENTION = "mha"
#: 编译器的调度与形状计算，不是算子。
_BOOKKEEPING = {"signal", "wait", "shape_call", "memset", "ShapeHostToDevice"}
_COPY = "copy"
_ACTIVATION = re.compile(r"^Total Activation Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
_DIMENSIONS = re.compile(r"Dimensions: \[([-\d,]*)\]")


class EngineLayer(BaseModel):
    """引擎的一层。

    Attributes:
        name: 编译器起的名字，去掉编号。
        kind: ``gemm``、``kgen``（生成的融合 kernel）、``custom_layer`` 或 ``PluginV3``（插件）、``runtime_fusion`` 等。
        onnx: 来自哪些 ONNX 节点。
        op: 它是插件时，对应的 ``dsx`` 算子。
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str
    onnx: list[str]
    op: str | None = None


def parse_layers(
    text: str, profiles: Sequence[str], plugins: Mapping[str, str]
) -> dict[str, list[EngineLayer]]:
    """日志或 inspector 的文本 → 每个优化配置的层。

    Args:
        text: ``Layers:`` 开头，一行一层。
        profiles: 优化配置的名字，次序即编号。
        plugins: 插件节点名 → 算子名。
    """
    parsed, graphs = [], {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or "LayerType" not in line:
            continue
        graph = _GRAPH.search(match["name"])
        number = _PROFILE.search(line)
        if graph and number:
            graphs[graph[1]] = int(number[1])
        parsed.append((match, graph[1] if graph else None, int(number[1]) if number else 0))
    found: dict[str, list[EngineLayer]] = {name: [] for name in profiles}
    for match, graph_id, own in parsed:
        if match["kind"] in _BOOKKEEPING:
            continue
        origins = [re.sub(_PROFILE, "", name).strip() for name in _ORIGIN.findall(match["rest"])]
        onnx = sorted({part for name in origins for part in name.split("+")})
        op = next((plugins[name] for name in onnx if name in plugins), None)
        layer = EngineLayer(
            name=_DECORATION.sub("", match["name"]),
            kind=match["kind"],
            onnx=onnx,
            op=op if match["kind"] in _PLUGIN_KINDS else None,
        )
        found[profiles[graphs.get(graph_id, own) if graph_id else own]].append(layer)
    return found


def activation_bytes(messages: Iterable[str], profiles: Sequence[str]) -> dict[str, int]:
    """每个优化配置的中间值至多占几字节，取自构建的日志；日志里没有的是空的。"""
    found = [int(match[1]) for text in messages if (match := _ACTIVATION.search(text))]
    return dict(zip(profiles, found, strict=True)) if len(found) == len(profiles) else {}


def weight_bytes(messages: Iterable[str]) -> int | None:
    """引擎的权重占几字节显存，取自构建的日志；几个优化配置共用一份。日志里没有的是 ``None``。"""
    return next((int(match[1]) for text in messages if (match := _WEIGHTS.search(text))), None)


def copied_caches(text: str, caches: Iterable[Sequence[int]]) -> list[str]:
    """把整块缓存抄一遍的层：缓存没有做到输入输出同一块，每一步都要多搬一遍。

    Args:
        text: 同 :func:`parse_layers`。
        caches: 各缓存除批之外的维；大小是 1 的维编译器会去掉，不比。
    """
    wanted = {tuple(size for size in cache if size != 1) for cache in caches}
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or match["kind"] != _COPY:
            continue
        shapes = ([int(size) for size in dims.split(",") if size] for dims in _DIMENSIONS.findall(line))
        if any(tuple(size for size in shape[1:] if size != 1) in wanted for shape in shapes):
            found.append(match["name"])
    return found


def missing_plugins(layers: Iterable[EngineLayer], plugins: Mapping[str, str]) -> list[str]:
    """没有成为插件层的插件节点。"""
    survived = {name for layer in layers if layer.op for name in layer.onnx}
    return sorted(plugins.keys() - survived)


def unfused_attention(layers: Iterable[EngineLayer], nodes: Iterable[str]) -> list[str]:
    """没有融成一个原生核的 ``Attention`` 节点：编译器把它拆成了矩阵乘、softmax，或与别的节点混在一起。"""
    fused = {layer.onnx[0] for layer in layers if _FUSED_ATTENTION in layer.name and len(layer.onnx) == 1}
    return sorted(set(nodes) - fused)


def layer_counts(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """``custom_layer dsx::LatentAttention`` → 个数；插件按算子分，其余按类型分。"""
    counts = Counter(f"dsx::{layer.op}" if layer.op else layer.kind for layer in layers)
    return dict(sorted(counts.items()))


def layer_listing(layers: Mapping[str, Mapping[str, Sequence[EngineLayer]]]) -> str:
    """引擎 → 优化配置 → 层，写成确定的文本，供 ``graphs/engines/`` 逐行比较。"""
    lines: list[str] = []
    for engine, profiles in layers.items():
        for profile, found in profiles.items():
            counts = "、".join(f"{kind}×{n}" for kind, n in layer_counts(found).items())
            lines += ["", f"[{engine} {profile}] {counts}"]
            for layer in found:
                what = f"dsx::{layer.op}" if layer.op else f"{layer.kind} {layer.name}"
                lines.append(f"{what} <- {', '.join(layer.onnx) or '-'}")
    return "\n".join(lines).lstrip("\n") + "\n"
