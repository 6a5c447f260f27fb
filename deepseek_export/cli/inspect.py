"""``dsx inspect``。"""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from deepseek_export.cli.console import console, echo_json, facts, table, weights_size
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import bundle_argument, json_option
from deepseek_export.cpu_library import LIBRARY_TARGET
from deepseek_export.dtypes import DTYPES
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.bundle import Manifest

CONTEXT = 8192
#: 试跑一次用的大小；S + past 不能超过 T，L 是 K + 1。
_TRIAL = {"B": 1, "S": 8, "T": 64, "K": 1, "K+1": 2}


class CacheShape(NamedTuple):
    """决定 KV 缓存大小的几个数，取自公开的 config.json。"""

    name: str
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent(self) -> int:
        """MLA：每个 token 每层缓存的数。"""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expanded(self) -> int:
        """展开的逐头 K 与 V。"""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)


PUBLISHED = (
    CacheShape("DeepSeek-V2-Lite", 27, 16, 512, 128, 64, 128),
    CacheShape("DeepSeek-V3", 61, 128, 512, 128, 64, 128),
)


@click.command("inspect", cls=Command, short_help="看 bundle 里有什么")
@bundle_argument
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """列出 bundle OUT 的算子、pass、回退、输入输出、权重与 KV 缓存。

    只读 manifest.json，不加载模型。末尾附真实模型（V2-Lite、V3）的缓存大小，由它们公开的 config.json 算出。
    """
    from deepseek_export.bundle import Bundle

    manifest = Bundle.open(bundle).manifest
    summary = summarize(manifest) | {"polygraphy": polygraphy_trials(bundle, manifest)}
    if as_json:
        echo_json(summary)
    else:
        _print(bundle, summary)


def summarize(manifest: Manifest) -> dict[str, Any]:
    """manifest 的汇总；``--json`` 输出的就是它。"""
    config, cache, recipes = manifest.model, manifest.cache, manifest.weights.recipes
    shape = CacheShape(
        "",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    # 展开的缓存没有 int8 这一种，按模型的 dtype 比。
    wide = manifest.dtype if cache.dtype == "int8" else cache.dtype
    expanded = DTYPES[wide].nbytes(shape.expanded * cache.num_layers)
    # 索引 key 两种形式都有。
    expanded += cache.bytes_per_token - DTYPES[cache.dtype].nbytes(
        cache.values_per_token_per_layer * cache.num_layers
    )
    return {
        "dsx_version": manifest.dsx_version,
        "family": config.family,
        "layers": config.num_hidden_layers,
        "moe_layers": config.num_moe_layers,
        "profile": manifest.profile.name,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "source": manifest.source.path,
        "graphs": [
            {
                "file": graph.file,
                "role": graph.role,
                "op_counts": graph.op_counts,
                "inputs": [value.model_dump() for value in graph.inputs],
                "outputs": [value.model_dump() for value in graph.outputs],
            }
            for graph in manifest.graphs
        ],
        "passes": [
            {"graph": graph.file, **result.model_dump(mode="json")}
            for graph in manifest.graphs
            for result in graph.passes
        ],
        "fallbacks": manifest.fallbacks,
        "cpu_library": manifest.cpu_library,
        "weights": {
            "mode": manifest.weights.mode,
            "count": len(recipes),
            "bytes": sum(recipe.nbytes for recipe in recipes.values()),
            "recipes": dict(Counter(recipe.op for recipe in recipes.values())),
        },
        "quantization": manifest.quantization and manifest.quantization.model_dump(mode="json"),
        "float32_islands": manifest.float32_islands,
        "cache": {
            "dtype": cache.dtype,
            "tensors": [tensor.model_dump() for tensor in cache.tensors],
            "values_per_token_per_layer": cache.values_per_token_per_layer,
            "expanded_values_per_token_per_layer": shape.expanded,
            "bytes_per_token": cache.bytes_per_token,
            "context": CONTEXT,
            "bytes_at_context": cache.bytes_per_token * CONTEXT,
            "expanded_bytes_at_context": expanded * CONTEXT,
            "ratio": expanded / cache.bytes_per_token,
        },
        "published": [_published(shape) for shape in PUBLISHED],
    }


def polygraphy_trials(path: Path, manifest: Manifest) -> dict[str, str]:
    """每张图用 Polygraphy 在 ONNX Runtime 上试跑一次的命令；不给形状时它取 1，而容量 1 的缓存放不下一步。

    Polygraphy 不会按配方生成权重，CPU 上也没有 bfloat16：按引用的、bfloat16 的、给 TensorRT 的没有。
    """
    if manifest.weights.mode == "reference" or manifest.target.startswith("tensorrt"):
        return {}
    commands = {}
    for graph in manifest.graphs:
        drafts = any(value.name == "draft_ids" for value in graph.inputs)
        sizes = _TRIAL | {"L": _TRIAL["K+1"] if drafts else 1}
        shapes = [
            f"{value.name}:[{','.join(str(sizes.get(str(dim), dim)) for dim in value.shape)}]"
            for value in graph.inputs
        ]
        words = ["polygraphy", "run", str(path / graph.file), "--onnxrt", "--input-shapes"]
        commands[graph.file] = " ".join([shlex.join(words), *(f"'{shape}'" for shape in shapes)])
    return commands


def _published(shape: CacheShape) -> dict[str, Any]:
    latent, expanded = (
        DTYPES["bfloat16"].nbytes(n * shape.num_hidden_layers) for n in (shape.latent, shape.expanded)
    )
    return {
        "name": shape.name,
        "layers": shape.num_hidden_layers,
        "values_per_token_per_layer": shape.latent,
        "expanded_values_per_token_per_layer": shape.expanded,
        "bytes_per_token": latent,
        "expanded_bytes_per_token": expanded,
        "bytes_at_context": latent * CONTEXT,
        "expanded_bytes_at_context": expanded * CONTEXT,
        "saving": 1 - latent / expanded,
    }


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
    if (quant := summary["quantization"]) is not None:
        kept = f"，保留 {'、'.join(quant['keep'])}" if quant["keep"] else ""
        rows.append(
            ("量化", f"{quant['kind']}，每 {quant['block']} 个一块，{len(quant['tensors'])} 个权重{kept}")
        )
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
