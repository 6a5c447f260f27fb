"""bundle 里的图由哪些块组成：嵌入、各层、输出头，各用哪些 dsx 算子，权重各多大。"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepseek_export.ops.table import MOE_EXPERTS, QUANTIZED_MOE_EXPERTS
from deepseek_export.report.svg import FONT, WIDTH, Picture, path, rect, text, wrapped
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.bundle import Manifest
    from deepseek_export.bundle.manifest import GraphEntry

_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_INSIDE_MLP = ("experts", "shared_experts", "gate")


def graph_blocks(manifest: Manifest) -> list[dict[str, Any]]:
    """每张图的每个块一项，按数据流经的次序。

    Returns:
        ``graph`` 图的文件名；``block`` 块名；``layer`` 层号，不是层的为 ``None``；``ops`` 捕获时的 ``dsx::`` 算子（下沉可能换掉节点）；
        ``weights`` 部分 → 字节。几张图共用的权重算在主模型里；认不出属于哪一块的在 ``other``。
    """
    layers: dict[int, Counter[str]] = {}
    rest: dict[str, Counter[str]] = {"embed": Counter(), "head": Counter(), "other": Counter()}
    for name, recipe in manifest.weights.recipes.items():
        if found := _LAYER.search(name):
            layers.setdefault(int(found[1]), Counter())[_part(found[2])] += recipe.nbytes
        else:
            block = (
                "embed"
                if "embed_tokens" in name
                else "head"
                if "norm" in name or "lm_head" in name
                else "other"
            )
            rest[block][_part(name.removeprefix("model."))] += recipe.nbytes
    made = []
    for graph in manifest.graphs:
        middle = [_layer(graph, layer, layers.get(layer, Counter())) for layer in graph.layers]
        main = graph.role == "main"
        made.append(_block(graph.file, "embed", rest["embed"] if main else Counter()))
        made += middle
        made.append(_block(graph.file, "head", rest["head"] if main else Counter()))
        if main and rest["other"]:
            made.append(_block(graph.file, "other", rest["other"]))
    return made


def _layer(graph: GraphEntry, layer: int, weights: Counter[str]) -> dict[str, Any]:
    ops = [site.op for site in graph.sites if site.layer == layer]
    return _block(graph.file, f"layers.{layer}", weights, layer, ops)


def _block(
    graph: str, name: str, weights: Counter[str], layer: int | None = None, ops: Sequence[str] = ()
) -> dict[str, Any]:
    return {"graph": graph, "block": name, "layer": layer, "ops": list(ops), "weights": dict(weights)}


def _part(name: str) -> str:
    """一个权重算在块的哪一部分。"""
    first, *more = name.split(".")
    if first == "mlp" and more[0] in _INSIDE_MLP:
        return f"mlp.{more[0]}"
    return "norm" if "norm" in first else first


def merged(blocks: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """挨着而一样的层并成一段。"""
    runs: list[list[dict[str, Any]]] = []
    for block in blocks:
        same = runs and block["layer"] is not None and _same(runs[-1][-1], block)
        if same:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["layer"] is not None and all(one[key] == other[key] for key in ("graph", "ops", "weights"))


def run_name(run: Sequence[dict[str, Any]]) -> str:
    """一段叫什么：``layers.1–5``。"""
    first, last = run[0], run[-1]
    name: str = first["block"]
    return name if first is last else f"{name}–{last['layer']}"


def kind(block: dict[str, Any]) -> str:
    """层的种类。"""
    experts = {MOE_EXPERTS.name, QUANTIZED_MOE_EXPERTS.name} & set(block["ops"])
    return "MoE" if "mlp.experts" in block["weights"] or experts else "稠密"


def graph_picture(
    graph: dict[str, Any], blocks: Sequence[dict[str, Any]], caches: Sequence[str], cache_bytes: int
) -> Picture:
    """一张图，自上而下：输入、各段、输出。

    Args:
        graph: ``dsx inspect --json`` 里的一张图。
        blocks: 这张图的块。
        caches: 每层的缓存张量，写好的形状。
        cache_bytes: 每层每个 token 的缓存，字节。
    """
    runs = merged(blocks)
    boxes = [("输入", [_names(graph["inputs"])], False)]
    boxes += [_box(run, caches, cache_bytes) for run in runs]
    boxes.append(("输出", [_names(graph["outputs"])], False))
    left, wide, y, made = 20.0, WIDTH - 40, 4.0, []
    for index, (title, lines, filled) in enumerate(boxes):
        shown = [piece for line in lines if line for piece in wrapped(line, wide - 24)]
        high = 26 + 17 * len(shown)
        if index:
            made.append(path([(WIDTH / 2, y), (WIDTH / 2, y + 14)], "ink"))
            made.append(path([(WIDTH / 2 - 4, y + 9), (WIDTH / 2, y + 14), (WIDTH / 2 + 4, y + 9)], "ink"))
            y += 15
        if filled:
            made.append(rect(left, y, wide, high, "box", radius=6.0))
        made.append(text(left + 12, y + 18, title, class_="strong", size=FONT + 1))
        made += [text(left + 12, y + 35 + 17 * i, line, class_="soft") for i, line in enumerate(shown)]
        y += high
    description = "；".join(f"{title}：{'，'.join(filter(None, lines))}" for title, lines, _ in boxes)
    return Picture(f"{graph['file']}，由上到下", f"{description}。", WIDTH, y + 6, "".join(made))


def _box(
    run: Sequence[dict[str, Any]], caches: Sequence[str], cache_bytes: int
) -> tuple[str, list[str], bool]:
    first = run[0]
    each = sum(first["weights"].values())
    if first["layer"] is None:
        shown = size(each) if each else "与主模型共用，或没有"
        return run_name(run), [f"权重 {shown}"], True
    count = len(run)
    weights = f"权重 每层 {size(each)}，共 {size(each * count)}" if count > 1 else f"权重 {size(each)}"
    cached = f"缓存 {'、'.join(caches)}，每层每个 token {size(cache_bytes)}"
    ops = f"dsx 算子 {'、'.join(first['ops'])}" if first["ops"] else "没有 dsx 算子，都是标准的"
    return f"{run_name(run)}（{count} 层，{kind(first)}）", [ops, weights, cached], True


def _names(values: Sequence[dict[str, Any]]) -> str:
    """输入输出的名字；逐层的缓存合成一个。"""
    return "、".join(dict.fromkeys(value["name"].partition(".")[0] for value in values))
