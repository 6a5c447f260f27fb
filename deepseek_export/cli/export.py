"""``dsx export``。"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deepseek_export.cli.console import console, echo_json, facts, weights_size
from deepseek_export.cli.doctor import TARGETS
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    DtypeChoice,
    balance_option,
    checkpoint_argument,
    json_option,
    set_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.cli.split import print_stages
from deepseek_export.errors import DsxError
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.api import ExportOptions
    from deepseek_export.bundle import Bundle, Manifest
    from deepseek_export.checkpoint.weight_only import Quantization


@click.command("export", cls=Command, short_help="把检查点编译成 ONNX bundle")
@checkpoint_argument
@click.argument("place", required=False, metavar="[OUT]", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--profile",
    default="baseline",
    show_default=True,
    help="优化方案：mla、moe、mtp，用 + 组合，full 是全开；或 TOML 文件。",
)
@click.option(
    "-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="输出目录，与第二个参数二选一。"
)
@click.option(
    "--target",
    default="portable",
    show_default=True,
    shell_complete=lambda ctx, param, incomplete: [name for name in TARGETS if name.startswith(incomplete)],
    help=f"编译目标：{'、'.join(TARGETS)}。",
)
@click.option(
    "--dtype",
    type=DtypeChoice(),
    default="float32",
    show_default=True,
    help="权重与计算的 dtype，也可以写 fp32、fp16、bf16；router 总是 float32。bfloat16 只用于 TensorRT 的目标。",
)
@click.option(
    "--weights",
    type=click.Choice(["packed", "reference"]),
    default="packed",
    show_default=True,
    help="packed 写成自包含的文件夹；reference 不写权重，指进检查点自己的文件（同一文件系统）。",
)
@click.option(
    "--hash-weights/--no-hash-weights",
    default=True,
    show_default=True,
    help="按引用时记下检查点每个文件的 sha256，以后 verify、pack、build 凭它查出改过一个字节的：有 Hugging Face 的下载记录就取自那里，没有的读一遍文件；大得读不起才关掉。",
)
@click.option(
    "--quant",
    type=click.Choice(["int8", "int4", "checkpoint"]),
    help="只量化权重（对称、分块）：ort-cpu 用 C++ 算子库的 kernel（没有库时是 MatMulNBits 与 QMoE），tensorrt、tensorrt-rtx 用读码的插件（int4 的线性层用 DequantizeLinear）；"
    "checkpoint 是 4 位的检查点（compressed-tensors、AWQ、GPTQ）照发布的码，其余保持浮点；缺省不量化。",
)
@click.option(
    "--quant-block",
    type=click.Choice(["32", "64", "128"]),
    help="每多少个输入维共用一个 scale，缺省 32；越小越准、越大。",
)
@click.option(
    "--keep",
    metavar="NAME,...",
    help="保持浮点的权重，逗号分隔，例如 lm_head,o_proj,layers.0；router 与 norm 总是浮点。",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="按这个 UTF-8 文本校准 int4 的码（GPTQ），预测离没有量化的更近；给与用途相近的文本，几万个 token 为好。",
)
@set_option
@click.option(
    "--stages",
    metavar="N|0-14,15-29",
    help="OUT 是切好的一套 stage，写法同 dsx split；先在旁边导出整个的，切好就删，打包的要放得下两份。",
)
@balance_option(None)
@click.option("--overwrite", is_flag=True, help="替换已有的 bundle；带 --stages 时是已有的一套 stage。")
@click.option("--check/--no-check", default=False, show_default=True, help="先校验、通过了才产生 OUT。")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="逐个列出 pass 改了几处、拒绝了哪些。")
def command(
    checkpoint: Path,
    place: Path | None,
    profile: str,
    output: Path | None,
    target: str,
    dtype: Literal["float32", "float16", "bfloat16"],
    weights: Literal["packed", "reference"],
    hash_weights: bool,
    quant: Literal["int8", "int4", "checkpoint"] | None,
    quant_block: str | None,
    keep: str | None,
    calibrate: Path | None,
    overrides: tuple[str, ...],
    stages: str | None,
    balance: Literal["bytes", "time"] | None,
    overwrite: bool,
    check: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """把 Hugging Face 检查点 CKPT 编译成 ONNX bundle，写到 OUT。

    优化默认全关（baseline），用 -p 逐项打开：mla 缓存潜向量而不是逐头 K/V，moe 只计算被选中的专家。OUT
    要么完整出现，要么不出现；中途被杀也不留半个 bundle。

    \b
    例：
      dsx export CKPT OUT -p mla+moe
      dsx export CKPT OUT -p mla --set mla.form=absorb --check
      dsx export CKPT OUT -p mla+moe --target ort-cpu --dtype float16
      dsx export CKPT OUT -p mla+moe --target ort-cpu --quant int8 --keep lm_head
      dsx export CKPT OUT -p mla+moe --target ort-cpu --quant int4 --calibrate TEXT
      dsx export CKPT OUT -p mla+moe --target ort-cpu --quant checkpoint
      dsx export CKPT STAGES -p full --stages 4
    """
    out = _one_place(place, output)
    if balance is not None and stages is None:
        raise DsxError("DSX-E740", "给了 --balance，却没有 --stages", "加 --stages N，或去掉它")
    options: ExportOptions = {
        "target": target,
        "dtype": dtype,
        "weights": weights,
        "hash_weights": hash_weights,
        "quantization": _quantization(quant, quant_block, keep, calibrate),
        "calibrate": calibrate,
        "check": check,
    }
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        if stages is None:
            bundle = api.export(
                checkpoint,
                out,
                profile,
                overrides=overrides,
                overwrite=overwrite,
                progress=progress,
                **options,
            )
            summary, made = _summary(bundle), None
        else:
            summary = {}
            made = api.export_stages(
                checkpoint,
                out,
                stages,
                profile,
                balance=balance or "bytes",
                overrides=overrides,
                overwrite=overwrite,
                exported=lambda whole: summary.update(_summary(whole)),
                progress=progress,
                **options,
            )
            items = [item.model_dump() for item in made.record.stages]
            summary |= {"out": str(made.path), "stages": items}
    if as_json:
        echo_json(summary)
        return
    if verbose:
        _print_passes(summary)
    _print_summary(summary)
    if made is None:
        click.echo(f"下一步：dsx verify {shlex.quote(summary['out'])}")
    else:
        print_stages(made)


def _one_place(place: Path | None, output: Path | None) -> Path:
    """输出目录写在哪里都行，两处都写就得相同。"""
    if place is not None and output is not None and place != output:
        raise click.UsageError(f"输出目录给了两个：{place} 与 --output {output}")
    out = place or output
    if out is None:
        raise click.UsageError("缺少输出目录：dsx export CKPT OUT")
    return out


def _quantization(
    quant: Literal["int8", "int4", "checkpoint"] | None,
    block: str | None,
    keep: str | None,
    calibrate: Path | None,
) -> Quantization | Literal["checkpoint"] | None:
    from deepseek_export.checkpoint.weight_only import Quantization

    given = {"--quant-block": block, "--keep": keep, "--calibrate": calibrate}
    found = [option for option, value in given.items() if value is not None]
    if quant is None:
        if found:
            raise DsxError(
                "DSX-E705", f"给了 {found[0]}，却没有 --quant", "加 --quant int8 或 int4，或去掉它"
            )
        return None
    if quant == "checkpoint":
        if found:
            raise DsxError(
                "DSX-E705",
                f"给了 {found[0]}，而 --quant checkpoint 的块、码与要保留的都由检查点决定",
                "去掉它；要自己定就用 --quant int8 或 int4",
            )
        return quant
    names = () if keep is None else tuple(name.strip() for name in keep.split(","))
    if not all(names):
        raise DsxError(
            "DSX-E312", f"--keep {keep!r} 里有空的名字", "写上要保持浮点的权重；一个也不留就去掉 --keep"
        )
    return Quantization.model_validate({"kind": quant, "block": int(block or 32), "keep": names})


def _summary(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    report = json.loads((bundle.path / "reports/export.json").read_text(encoding="utf-8"))
    return {
        "out": str(bundle.path),
        "profile": manifest.profile.name,
        "target": manifest.target,
        "dtype": manifest.dtype,
        "weights": manifest.weights.mode,
        "op_counts": {graph.file: graph.op_counts for graph in manifest.graphs},
        "passes": [
            {"graph": graph.file, **result.model_dump(mode="json")}
            for graph in manifest.graphs
            for result in graph.passes
        ],
        "quant": manifest.quantization and manifest.quantization.kind,
        "quant_block": manifest.quantization and manifest.quantization.block,
        "calibration": _calibration(manifest),
        "fallbacks": manifest.fallbacks,
        "cache_bytes_per_token": manifest.cache.bytes_per_token,
        **report,
    }


def _calibration(manifest: Manifest) -> dict[str, Any] | None:
    """怎么校准的；没有就是 ``None``。"""
    entry = manifest.quantization and manifest.quantization.calibration
    return entry.model_dump() if entry else None


def _print_passes(summary: dict[str, Any]) -> None:
    if not summary["passes"]:
        click.echo(f"目标 {summary['target']} 没有 pass：dsx 算子走各自的函数体")
    for result in summary["passes"]:
        click.echo(
            f"{result['graph']} pass {result['name']}：改写 {result['count']} 处，拒绝 {len(result['refused'])} 处"
        )
        for refusal in result["refused"]:
            click.echo(f"  拒绝 {refusal['node']}：{refusal['reason']}（{refusal['value']}）")


def _quantization_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """量化的一行与最敏感的权重；没有量化就没有。"""
    if (quantization := summary.get("quantization")) is None:
        return []
    errors = quantization["tensors"]
    worst = "、".join(f"{name}（{errors[name]['relative']:.2%}）" for name in quantization["most_sensitive"])
    what = f"{summary['quant']}，每 {summary['quant_block']} 个一块；{len(errors)} 个权重，相对误差最大的：{worst}"
    rows = [("量化", what)]
    if (found := summary["calibration"]) is not None:
        text = f"{found['file']}，{found['tokens']:,} 个 token"
        rows.append(("校准", f"{found['method'].upper()}，{found['tensors']} 个检查点张量，按 {text}"))
    return rows


def _print_summary(summary: dict[str, Any]) -> None:
    totals: Counter[str] = Counter()
    for counts in summary["op_counts"].values():
        totals.update(counts)
    custom = [f"{op}×{n}" for op, n in sorted(totals.items()) if not op.startswith("ai.onnx::")]
    seconds = summary["seconds"]
    rows = [
        ("方案", f"{summary['profile']}，目标 {summary['target']}，{summary['dtype']}"),
        ("算子", f"{summary['nodes']} 个节点" + (f"，其中 {'、'.join(custom)}" if custom else "")),
        ("权重", weights_size(summary["weight_bytes"], summary["weights"])),
        *_quantization_rows(summary),
        ("KV 缓存", f"每个 token {summary['cache_bytes_per_token']:,} 字节"),
        ("用时", f"{sum(seconds.values()):.1f} s，峰值内存 {size(summary['peak_rss_bytes'])}"),
        *(("回退", line) for line in summary["fallbacks"]),
    ]
    console().print(facts(f"已导出 {summary['out']}", rows))
