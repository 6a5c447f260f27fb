"""``dsx inspect --html`` 的页：计算图由哪些块组成，权重与缓存各多大，pass 改了什么。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek_export.dtypes import DTYPES
from deepseek_export.report.bars import Bar, Group, Stack, bar_chart, stack_chart
from deepseek_export.report.blocks import graph_picture, kind, merged, run_name
from deepseek_export.report.page import Cell, Code, Number, Page, Section, Table, integer, nbytes
from deepseek_export.report.svg import COLOURS, Picture
from deepseek_export.units import size


def inspect_page(path: str, summary: dict[str, Any]) -> Page:
    """``summary`` 是 ``dsx inspect --json`` 输出的。"""
    weights = summary["weights"]
    facts: list[tuple[str, Cell]] = [
        ("模型", f"{summary['family']}，{summary['layers']} 层，其中 MoE {summary['moe_layers']} 层"),
        ("方案", f"{summary['profile']}，目标 {summary['target']}，{summary['dtype']}"),
        ("检查点", Code(summary["source"])),
        ("权重的个数", integer(weights["count"])),
        ("权重", nbytes(weights["bytes"])),
        ("存法", "按引用，加载时从检查点生成" if weights["mode"] == "reference" else "打包在 bundle 里"),
        ("配方", _counts(weights["recipes"])),
    ]
    if weights["sha256_from"]:
        facts.append(("检查点的 sha256", hash_sources(weights["sha256_from"])))
    if summary["int4"] is not None:
        facts.append(("检查点的量化", summary["int4"]))
    if (quant := summary["quantization"]) is not None:
        facts.append(("量化", f"{quant['kind']}，每 {quant['block']} 个一块，{len(quant['tensors'])} 个权重"))
        if (found := quant["calibration"]) is not None:
            facts.append(
                ("校准", f"{found['method'].upper()}，按 {found['file']} 的 {found['tokens']} 个 token")
            )
    facts += [
        ("float32 孤岛", _counts(summary["float32_islands"]) or "没有"),
        ("导出时的 C++ 算子库", summary["cpu_library"] or "没有"),
        ("dsx", summary["dsx_version"]),
    ]
    sections = [_graph(graph, summary) for graph in summary["graphs"]]
    fallbacks = summary["fallbacks"] or ["没有"]
    inside = _stages(summary["stages"]) if "stages" in summary else _passes(summary)
    sections += [_sizes(summary), _cache(summary), inside, Section("回退", notes=fallbacks)]
    if summary["polygraphy"]:
        sections.append(
            Section("试跑一次", facts=[(name, Code(line)) for name, line in summary["polygraphy"].items()])
        )
    return Page(f"dsx inspect：{path}", None, facts, sections)


def hash_sources(counts: dict[str, int]) -> str:
    """检查点文件的 sha256 从哪里来，给人看的。"""
    names = {
        "read": "读文件算的",
        "hub": "取自 Hugging Face 的下载记录（加载时核对一次）",
        "none": "没有记",
    }
    return "，".join(f"{count} 个文件{names[source]}" for source, count in sorted(counts.items()))


def _graph(graph: dict[str, Any], summary: dict[str, Any]) -> Section:
    blocks = [block for block in summary["blocks"] if block["graph"] == graph["file"]]
    cache = summary["cache"]
    shapes = [f"{tensor['name']}[B,{tensor['heads']},T,{tensor['width']}]" for tensor in cache["tensors"]]
    each = DTYPES[cache["dtype"]].nbytes(cache["values_per_token_per_layer"])
    ops: list[list[Cell]] = [[op, integer(count)] for op, count in graph["op_counts"].items()]
    ports: list[list[Cell]] = [
        [Code(value["name"]), way, f"[{', '.join(map(str, value['shape']))}]", value["dtype"]]
        for way, key in (("输入", "inputs"), ("输出", "outputs"))
        for value in graph[key]
    ]
    role = {"main": "主模型", "draft": "草稿模型"}.get(graph["role"], graph["role"])
    return Section(
        f"{role} {graph['file']}",
        pictures=[graph_picture(graph, blocks, shapes, each)],
        tables=[
            Table("算子", ("域::算子", "个数"), ops),
            Table("输入与输出", ("名字", "", "形状", "dtype"), ports),
        ],
    )


def _sizes(summary: dict[str, Any]) -> Section:
    blocks = summary["blocks"]
    parts = list(dict.fromkeys(part for block in blocks for part in block["weights"]))
    rows: list[list[Cell]] = [
        [
            f"{block['graph']} {block['block']}",
            "-" if block["layer"] is None else kind(block),
            "、".join(block["ops"]) or "-",
            *(nbytes(block["weights"].get(part, 0)) for part in parts),
            nbytes(sum(block["weights"].values())),
        ]
        for block in blocks
    ]
    table = Table("每个块的权重", ("块", "种类", "dsx 算子", *parts, "合计"), rows)
    lead = ["一样的层并成一行，条是一层的；几张图共用的权重算在主模型里。"]
    return Section("权重在哪里", lead, pictures=[_size_picture(blocks, parts)], tables=[table])


def _size_picture(blocks: Sequence[dict[str, Any]], parts: Sequence[str]) -> Picture:
    stacks = []
    for run in merged(blocks):
        each = sum(run[0]["weights"].values())
        if each:
            shown = (
                size(each) if len(run) == 1 else f"每层 {size(each)}，{len(run)} 层共 {size(each * len(run))}"
            )
            values = [run[0]["weights"].get(part, 0) for part in parts]
            stacks.append(Stack(run_name(run), values, shown, group=run[0]["graph"]))
    description = "；".join(f"{stack.group} {stack.name} {stack.shown}" for stack in stacks)
    slots = [(index + 1) % COLOURS for index in range(len(parts))]
    return stack_chart("每个块的权重", f"{description}。", stacks, parts, slots=slots)


def _cache(summary: dict[str, Any]) -> Section:
    cache = summary["cache"]
    keys = list(dict.fromkeys(key for tensor in cache["tensors"] for key in tensor))
    tensors: list[list[Cell]] = [[_value(tensor.get(key)) for key in keys] for tensor in cache["tensors"]]
    at = f"{cache['context']} token（batch 1）"
    pairs = {"这个 bundle": cache["bytes_at_context"], "展开的": cache["expanded_bytes_at_context"]}
    bars = [
        Bar(name, value, value, value, size(value), slot)
        for slot, (name, value) in zip((1, 0), pairs.items(), strict=True)
    ]
    published = summary["published"]
    groups = [Group("这个模型", bars)]
    for model in published:
        values = {"潜向量": model["bytes_at_context"], "展开的": model["expanded_bytes_at_context"]}
        groups.append(
            Group(
                f"{model['name']}（bf16）",
                [
                    Bar(name, v, v, v, size(v), slot)
                    for slot, (name, v) in zip((1, 0), values.items(), strict=True)
                ],
            )
        )
    pictures = [
        bar_chart(
            f"KV 缓存，{at}：{group.name}",
            "，".join(f"{bar.name} {bar.shown}" for bar in group.bars) + "。",
            [Group("", group.bars)],
            note="↓ 越低越好",
        )
        for group in groups
    ]
    columns = ("模型", "层数", "每 token 每层（个）", "展开", "每 token", "展开", at, "展开", "省")
    rows: list[list[Cell]] = [
        [
            model["name"],
            integer(model["layers"]),
            integer(model["values_per_token_per_layer"]),
            integer(model["expanded_values_per_token_per_layer"]),
            nbytes(model["bytes_per_token"]),
            nbytes(model["expanded_bytes_per_token"]),
            nbytes(model["bytes_at_context"]),
            nbytes(model["expanded_bytes_at_context"]),
            Number(model["saving"], f"{model['saving']:.1%}"),
        ]
        for model in published
    ]
    facts: list[tuple[str, Cell]] = [
        ("dtype", cache["dtype"]),
        ("每个 token 每层（个）", integer(cache["values_per_token_per_layer"])),
        ("每个 token", nbytes(cache["bytes_per_token"])),
        ("展开的是几倍", Number(cache["ratio"], f"{cache['ratio']:.3g}")),
    ]
    return Section(
        "KV 缓存",
        facts=facts,
        pictures=pictures,
        tables=[
            Table("每层的缓存张量", keys, tensors),
            Table("这个 bundle", ("", at), [[name, nbytes(value)] for name, value in pairs.items()]),
            Table("真实模型的缓存（bf16，由公开的 config.json 算出）", columns, rows),
        ],
    )


def _value(value: object) -> Cell:
    """缓存张量的一个字段；有哪些字段由 manifest 说了算。"""
    if isinstance(value, int) and not isinstance(value, bool):
        return integer(value)
    return Code(value) if isinstance(value, str) else "-" if value is None else str(value)


def _stages(stages: Sequence[dict[str, Any]]) -> Section:
    rows: list[list[Cell]] = [
        [
            one["directory"],
            f"{one['layers'][0]}–{one['layers'][-1]}",
            nbytes(one["weight_bytes"]),
            "、".join(one["graphs"]),
            "、".join(one["engines"]) or "没有",
        ]
        for one in stages
    ]
    return Section("各个 stage", tables=[Table("stage", ("目录", "层", "权重", "图", "引擎"), rows)])


def _passes(summary: dict[str, Any]) -> Section:
    if not summary["passes"]:
        return Section("pass", [f"没有：目标 {summary['target']} 不下沉，dsx 算子走各自的函数体。"])
    rows: list[list[Cell]] = [
        [
            one["name"],
            one["graph"],
            integer(one["count"]),
            integer(len(one["refused"])),
            "；".join(
                dict.fromkeys(f"{refusal['reason']}（{refusal['value']}）" for refusal in one["refused"])
            ),
        ]
        for one in summary["passes"]
    ]
    return Section("pass", tables=[Table("pass", ("名字", "图", "改写", "拒绝", "拒绝的原因"), rows)])


def _counts(counts: dict[str, int]) -> str:
    return "、".join(f"{name} {count}" for name, count in counts.items())
