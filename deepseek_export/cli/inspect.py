"""``dsx inspect``。"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from deepseek_export import inspection
from deepseek_export.cli.console import console, echo_json, facts, table, weights_size, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import bundle_argument, html_option, json_option
from deepseek_export.cli.split import layer_span
from deepseek_export.cpu_library import LIBRARY_TARGET
from deepseek_export.inspection import CONTEXT
from deepseek_export.report.inspect import hash_sources, inspect_page
from deepseek_export.units import size


@click.command("inspect", cls=Command, short_help="看 bundle 里有什么")
@bundle_argument
@html_option
@json_option
def command(bundle: Path, html: Path | None, as_json: bool) -> None:
    """列出 bundle OUT 的算子、pass、回退、输入输出、权重与 KV 缓存；OUT 也可以是一套 stage，另列每个 stage 的层、权重与引擎。

    只读 manifest.json，不加载模型。末尾附真实模型（V2-Lite、V3）的缓存大小，由它们公开的 config.json 算出。
    """
    summary = inspection.inspect(bundle)
    if as_json:
        echo_json(summary)
    else:
        _print(bundle, summary)
    write_html(html, as_json, inspect_page, str(bundle), summary)


def _shown(tensor: dict[str, Any]) -> str:
    """一种缓存的形状；不是每一层都有的写明几层，dtype 另有一样的也写明。"""
    partial = "" if tensor["layers"] is None else f"（{len(tensor['layers'])} 层）"
    return f"{tensor['name']}[B,{tensor['heads']},T,{tensor['width']}]{tensor['dtype'] or ''}{partial}"


def _print(path: Path, summary: dict[str, Any]) -> None:
    out = console()
    weights, cache = summary["weights"], summary["cache"]
    recipes = "、".join(f"{op} {count}" for op, count in weights["recipes"].items())
    islands = "、".join(f"{op} {count}" for op, count in summary["float32_islands"].items())
    rows = [
        ("模型", f"{summary['family']}，{summary['layers']} 层，其中 MoE {summary['moe_layers']} 层"),
        ("方案", f"{summary['profile']}，目标 {summary['target']}，{summary['dtype']}"),
        ("检查点", summary["source"]),
        (
            "权重",
            f"{weights['count']} 个，{weights_size(weights['bytes'], weights['mode'])}（配方：{recipes}）",
        ),
    ]
    if weights["sha256_from"]:
        rows.append(("检查点的 sha256", hash_sources(weights["sha256_from"])))
    if summary["int4"] is not None:
        rows.append(("检查点的量化", summary["int4"]))
    if (quant := summary["quantization"]) is not None:
        kept = f"，保留 {'、'.join(quant['keep'])}" if quant["keep"] else ""
        rows.append(
            ("量化", f"{quant['kind']}，每 {quant['block']} 个一块，{len(quant['tensors'])} 个权重{kept}")
        )
        if (found := quant["calibration"]) is not None:
            how = f"{found['method'].upper()}，按 {found['file']} 的 {found['tokens']:,} 个 token"
            rows.append(("校准", how))
    if summary["dtype"] == "float16":
        rows.append(("float32 孤岛", islands or "没有"))
    if summary["target"] == LIBRARY_TARGET:
        rows.append(("导出时的 C++ 算子库", summary["cpu_library"] or "没有"))
    rows += [("回退", line) for line in summary["fallbacks"]] or [("回退", "没有")]
    out.print(facts(f"{path}（dsx {summary['dsx_version']}）", rows))
    for graph in summary["graphs"]:
        out.print()
        counts = Counter(graph["op_counts"]).most_common()
        own = [f"{op}×{n}" for op, n in counts if not op.startswith("ai.onnx::")]
        standard = [f"{op.removeprefix('ai.onnx::')}×{n}" for op, n in counts if op.startswith("ai.onnx::")]
        out.print(
            facts(
                f"计算图 {graph['file']}",
                [
                    ("非标准算子", "、".join(own) or "没有"),
                    ("标准算子", "、".join(standard)),
                    *(("输入", text) for text in _values(graph["inputs"])),
                    *(("输出", text) for text in _values(graph["outputs"])),
                ],
            )
        )
    out.print()
    if "stages" in summary:
        _print_stages(out, summary["stages"])
    else:
        _print_passes(out, summary)
    heads = "、".join(_shown(tensor) for tensor in cache["tensors"])
    values, expanded = cache["values_per_token_per_layer"], cache["expanded_values_per_token_per_layer"]
    at = f"{CONTEXT} token（batch 1）"
    unit = "字节" if cache["dtype"] == "int8" else "个数"
    if values < expanded:
        against = f"展开的缓存是 {size(cache['expanded_bytes_at_context'])}，即 {cache['ratio']:.1f} 倍"
    else:
        against = "就是展开的缓存；-p mla 只缓存潜向量"
    out.print(
        facts(
            "KV 缓存",
            [
                ("每层", f"{heads}，{cache['dtype']}"),
                ("每个 token 每层", f"{values:,} {unit}（展开是 {expanded:,} 个数）"),
                ("每个 token", f"{cache['bytes_per_token']:,} 字节"),
                (at, f"{size(cache['bytes_at_context'])}；{against}"),
            ],
        )
    )
    for command in summary["polygraphy"].values():
        click.echo(f"\n试跑    {command}")  # 很长，要原样复制：不放进表里
    out.print()
    out.print(_published_table(summary["published"]))


def _values(values: list[dict[str, Any]]) -> list[str]:
    """输入输出各一行；同样形状的逐层缓存合成一行。"""
    grouped: dict[tuple[str, str], list[str]] = {}
    for value in values:
        base, _, layer = value["name"].partition(".")
        shape = ",".join(map(str, value["shape"]))
        grouped.setdefault((base, f"[{shape}] {value['dtype']}"), []).append(layer)
    lines = []
    for (base, kind), layers in grouped.items():
        name = (
            base
            if layers == [""]
            else f"{base}.{{{layers[0]}..{layers[-1]}}}"
            if len(layers) > 1
            else f"{base}.{layers[0]}"
        )
        lines.append(f"{name} {kind}")
    return lines


def _print_stages(out: Any, stages: list[dict[str, Any]]) -> None:
    shown = table(f"{len(stages)} 个 stage", "目录", "层", "权重", "图", "引擎", right=("权重",))
    for one in stages:
        shown.add_row(
            one["directory"],
            layer_span(one["layers"]),
            size(one["weight_bytes"]),
            "、".join(one["graphs"]),
            "、".join(one["engines"]) or "没有",
        )
    out.print(shown)
    out.print()


def _print_passes(out: Any, summary: dict[str, Any]) -> None:
    if not summary["passes"]:
        out.print(facts("pass", [("没有", f"目标 {summary['target']} 不下沉，dsx 算子走各自的函数体")]))
        out.print()
        return
    made = table("pass", "图", "名字", "改写", "拒绝", "拒绝的原因", right=("改写", "拒绝"))
    for result in summary["passes"]:
        reasons = Counter(f"{refusal['reason']}（{refusal['value']}）" for refusal in result["refused"])
        text = "\n".join(f"{reason} × {count}" if count > 1 else reason for reason, count in reasons.items())
        made.add_row(
            result["graph"], result["name"], str(result["count"]), str(len(result["refused"])), text or "-"
        )
    out.print(made)
    out.print()


def _published_table(published: list[dict[str, Any]]) -> Any:
    numbers = ("层数", "每 token 每层（展开）", "每 token", f"{CONTEXT} token（展开）", "省")
    made = table(
        "真实模型的缓存（bf16，batch 1，由公开的 config.json 算出）",
        "模型",
        *numbers,
        right=numbers,
        optional=("层数", "每 token 每层（展开）"),
    )
    for row in published:
        values, expanded = row["values_per_token_per_layer"], row["expanded_values_per_token_per_layer"]
        made.add_row(
            row["name"],
            str(row["layers"]),
            f"{values:,} 个数（{expanded:,}）",
            f"{row['bytes_per_token']:,} 字节",
            f"{size(row['bytes_at_context'])}（{size(row['expanded_bytes_at_context'])}）",
            f"{row['saving']:.1%}",
        )
    return made
