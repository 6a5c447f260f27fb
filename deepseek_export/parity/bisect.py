"""``dsx compare --bisect``：一个块不对时，找出块里第一个不对的节点。

参照是 PyTorch 自己的中间值。exporter 用 aten 节点的名字给 ONNX 的值命名，所以把同一个块在捕获时的 PyTorch 程序逐节点再执行一遍
（真权重、同样的输入），图里几乎每个值都有了对应的 PyTorch 值。然后在所有这些值处断开：每一小段的输入都由 PyTorch 喂，各自与
PyTorch 比。于是不必二分，一次运行就看完；一段不对，毛病就在这一段里，与上游无关。

不拿「同一张图换一种执行方式」做参照：权重或属性错了，两边会错得一样。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from deepseek_export.backend.base import Run
from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.capture import blocks as capture
from deepseek_export.capture.places import EMBED_PORTS, Place, head_ports, layer_ports, mtp_ports
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.ops.int8_cache import padded_rows
from deepseek_export.parity.arrays import to_numpy, to_torch, widened
from deepseek_export.parity.block import Block, Output
from deepseek_export.parity.measures import measure
from deepseek_export.parity.polygraphy import GRAPH, Iteration, polygraphy_command, save_comparison
from deepseek_export.parity.report import Case
from deepseek_export.parity.subgraph import ModelGraph, feeds_for
from deepseek_export.parity.tolerances import Key, tolerance
from deepseek_export.passes import skip_index_queries
from deepseek_export.reference import DraftModel, Forms, ReferenceModel
from deepseek_export.reference.weights import torch_dtype


class NodeEntry(BaseModel):
    """一个 ONNX 节点。"""

    model_config = ConfigDict(extra="forbid")

    name: str
    op: str
    inputs: list[str]
    attributes: dict[str, Any]


class Culprit(BaseModel):
    """块里第一个不对的地方。

    Attributes:
        checked: 一共比了多少个值。
        value: 第一个不对的值；每个值单独都对时为空。
        nodes: 从上一批 PyTorch 的值算到 ``value`` 的节点，最后一个产生 ``value``。
        case: 这个值的比较。
        causes: 查得出的原因：权重与检查点不同，属性、常量或接线与捕获时不同。
        command: 在 dsx 之外重复这次逐节点比较的命令。
    """

    model_config = ConfigDict(extra="forbid")

    graph: str
    block: str
    phase: str
    checked: int
    command: str
    value: str = ""
    nodes: list[NodeEntry] = []
    case: Case | None = None
    causes: list[str] = []


def bisect_block(
    bundle: Bundle,
    checkpoint: Checkpoint,
    entry: GraphEntry,
    reference: ReferenceModel | DraftModel,
    block: Block,
    graph: ModelGraph,
    run: Run,
    folder: Path,
    out: Path,
) -> Culprit:
    """找出 ``block`` 里第一个不对的节点。

    Args:
        bundle: 被验证的 bundle。
        checkpoint: 对照的检查点，用来核对权重。
        entry: 块所在的图。
        reference: 这张图的参考实现。
        block: 不对的块（及阶段）。
        graph: ``run`` 跑的那张图；TensorRT 的是下沉过的。
        run: 查出它不对的后端。
        folder: 断开的图、输入与参照写到这里，格式与逐块比较相同。
        out: ``folder`` 最后改名成什么，写在命令里。
    """
    place, module = _locate(bundle, entry, reference, block)
    values = _pytorch_values(bundle.manifest, place, module, block)
    nodes = graph.upstream([output.value for output in block.outputs], block.feeds)
    marked = [name for node in nodes for name in node.output if name in values and name in graph.values]
    asked = _every_query(graph, block)
    known = {*block.feeds, *asked, *marked}
    model = graph.cut(dict.fromkeys([*block.feeds, *asked, *marked]), marked)
    key: Key = ("op", bundle.manifest.dtype, bundle.manifest.quant)
    ranked = {output.value: output for output in block.outputs if output.ranking is not None}
    outputs = [
        replace(ranked[name], want=values[name])
        if name in ranked
        else _output(name, widened(values[name]), key)
        for name in marked
    ]
    feeds = feeds_for(model, {**block.feeds, **values, **asked})
    iteration = Iteration(feeds, {output.value: output.want for output in outputs})
    save_comparison(folder, model, graph, [iteration])
    culprit = Culprit(
        graph=entry.file,
        block=block.name,
        phase=block.phase,
        checked=len(marked),
        command=polygraphy_command(out / GRAPH, out, tolerance(*key).max_abs, outputs),
    )
    (got,) = run(folder / GRAPH, [feeds])
    for output in outputs:
        case = output.compare("op", f"{output.label} ({block.phase})", got[output.value])
        if case.passed:
            continue
        guilty = graph.upstream([output.value], known)
        culprit.value, culprit.case = output.value, case
        culprit.nodes = [_entry(node) for node in guilty]
        for node in guilty:
            culprit.causes += _node_changes(graph, place, node)
        culprit.causes += _weight_changes(graph, bundle, checkpoint, guilty)
        break
    return culprit


def _every_query(graph: ModelGraph, block: Block) -> dict[str, np.ndarray]:
    """名额够的一步图里不算索引器的 query，PyTorch 的程序却算：给出行数，让它们都在。"""
    names = [name for name in graph.values if name.endswith(skip_index_queries.ROWS)]
    S = next((array.shape[1] for array in block.feeds.values() if array.ndim == 3), 0)
    return {name: np.array([S]) for name in names}


def _output(name: str, want: np.ndarray, key: Key) -> Output:
    """整数与布尔（例如选中的专家）没有舍入，按 float32 的容差就是要求相等；选中的 key 认得并列，不经这里。"""
    return Output(
        name, name, want, key if np.issubdtype(want.dtype, np.floating) else ("op", "float32", None)
    )


def _locate(
    bundle: Bundle, entry: GraphEntry, reference: ReferenceModel | DraftModel, block: Block
) -> tuple[Place, nn.Module]:
    """块在捕获时属于哪个追踪块，以及参考实现里对应的模块；追踪按参数缓存，参数与导出时相同。"""
    manifest = bundle.manifest
    config, forms = manifest.model, Forms.for_capture(manifest.profile)
    dtype, cache_dtype = torch_dtype(manifest.dtype), torch_dtype(manifest.cache.dtype)

    def caches(layer: int) -> list[str]:
        return [tensor.name for tensor in manifest.cache.of_layer(layer)]

    if isinstance(reference, DraftModel):
        part, index = block.name.removeprefix(f"{entry.file} "), reference.index
        if part == "embed":
            return Place(capture.embed_block(config, dtype, index + 1), "embed", EMBED_PORTS), reference.embed
        if part == "head":
            return Place(capture.draft_head_block(config, dtype), "head", {}), reference.head
        traced = capture.mtp_block(config, index, forms, dtype, cache_dtype)
        return Place(traced, "mtp", mtp_ports(entry.layers[0], caches(entry.layers[0]))), reference.mtp
    if block.name == "embed":
        return Place(capture.embed_block(config, dtype), "embed", EMBED_PORTS), reference.embed
    if block.name == "head":
        ports = head_ports(config.num_hidden_layers)
        return Place(capture.head_block(config, dtype), "head", ports), reference.head
    layer = int(block.name.split(".")[1])
    kind = config.is_moe_layer(layer), config.runs_indexer(layer)
    traced = capture.layer_block(config, *kind, forms, dtype, cache_dtype)
    ports = layer_ports(layer, caches(layer), config.chooser_of(layer))
    return Place(traced, f"layers.{layer}", ports), reference.layers[layer]


def _pytorch_values(
    manifest: Manifest, place: Place, module: nn.Module, block: Block
) -> dict[str, np.ndarray]:
    """图里的值名 → PyTorch 在那里的值。

    Raises:
        AssertionError: 捕获的程序与参考实现算得不一样（dsx 的缺陷）。
    """
    parameters = dict(module.named_parameters())
    known: dict[str, Tensor] = {name: parameters[name] for name in place.weights}
    assert place.block.retrace is not None
    program = place.block.retrace()
    local = {place.value(name): name for name in program.values.values() if name not in known}
    # TensorRT 的目标的图里 int8 缓存的行末尾补过零，捕获的程序里没有。
    narrow, wide = manifest.model.latent_cache_width(int8=True), manifest.cache.tensors[0].width

    def resized(rows: Tensor, old: int, new: int) -> Tensor:
        latent = rows.dtype == torch.int8 and rows.ndim == 4 and rows.shape[-1] == old
        return padded_rows(rows[..., :new], new) if latent else rows

    fed = {local[name]: to_torch(array) for name, array in block.feeds.items() if name in local}
    known |= {own: resized(rows, wide, narrow) for own, rows in fed.items()}
    computed = program.evaluate(known, [local[output.value] for output in block.outputs])
    made = {name: computed[own].contiguous() for name, own in local.items() if own in computed}
    values = {name: to_numpy(resized(rows, narrow, wide)) for name, rows in made.items()}
    for output in block.outputs:
        case = output.compare("block", output.label, values[output.value])
        assert case.passed, f"捕获的程序与参考实现不一致：{output.label}"
    return values


def _entry(node: onnx.NodeProto) -> NodeEntry:
    op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return NodeEntry(name=node.name, op=op, inputs=list(node.input), attributes=_attributes(node))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _node_changes(graph: ModelGraph, place: Place, node: onnx.NodeProto) -> list[str]:
    """与捕获时的同名节点不同的属性、常量、接线；下沉时换掉的节点没有同名的，换掉的值没有了，都查不出。"""
    names = {place.node(index): traced for index, traced in enumerate(place.block.nodes)}
    traced = names.get(node.name)
    if traced is None or (traced.op_type, len(traced.input)) != (node.op_type, len(node.input)):
        return []
    changes = []
    mine, captured = _attributes(node), _attributes(traced)
    # 下沉会把 Reshape 拼出来的目标换成常量，allowzero 随之去掉：不是缺陷。
    folded = node.op_type == "Reshape" and node.input[1] in graph.initializers
    for name in sorted(mine.keys() | captured.keys()):
        if folded and name == "allowzero":
            continue
        if mine.get(name) != captured.get(name):
            values = [_text(table.get(name)) for table in (mine, captured)]
            changes.append(f"{node.name} 的属性 {name} 是 {values[0]}，捕获时是 {values[1]}")
    for position, (name, own) in enumerate(zip(node.input, traced.input, strict=True)):
        if own in place.block.constants:
            want = numpy_helper.to_array(place.block.constants[own])
            if name not in graph.initializers or not np.array_equal(graph.array(name), want):
                changes.append(f"{node.name} 的第 {position} 个输入（{name}）与捕获时的常量不同")
        elif own in place.weights or not own or (folded and position == 1):
            continue
        elif _captured_name(graph, name) not in (place.value(own), None) and place.value(own) in graph.values:
            changes.append(f"{node.name} 的第 {position} 个输入接的是 {name}，捕获时是 {place.value(own)}")
    return changes


def _captured_name(graph: ModelGraph, name: str) -> str | None:
    """``name`` 在捕获的图里叫什么：只算要排名的 query 的那几行还是原来的值；随之改了的形状没有对应的，为 ``None``。"""
    if skip_index_queries.SCOPE not in name:
        return name
    maker = graph.producers[name]
    return maker.input[0] if maker.op_type == "Slice" else None


def _text(value: Any) -> str:
    if value is None:
        return "缺省"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _weight_changes(
    graph: ModelGraph, bundle: Bundle, checkpoint: Checkpoint, nodes: Sequence[onnx.NodeProto]
) -> list[str]:
    """与检查点（按配方现算）不同的权重。"""
    recipes: Mapping[str, Any] = bundle.manifest.weights.recipes
    changes = []
    for name in dict.fromkeys(name for node in nodes for name in node.input):
        if name in recipes and name in graph.initializers:
            found, want = graph.array(name), load_array(name, recipes[name], checkpoint.store)
            if not np.array_equal(found, want):
                m = measure(found, want)
                changes.append(
                    f"权重 {name} 与检查点不同：{list(m.coordinate)} 处是 {m.got:.7g}，检查点是 {m.want:.7g}"
                )
    return changes
