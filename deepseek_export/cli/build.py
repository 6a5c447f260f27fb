"""``dsx build``。"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import bundle_argument, json_option, verify_weights_option
from deepseek_export.cli.progress import open_progress
from deepseek_export.engine.flavour import FLAVOURS, FlavourName, parse_arch
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.engine.build import BuiltEngine
    from deepseek_export.engine.layers import EngineLayer
    from deepseek_export.engine.record import EngineEntry

_SHOWN = 8


@click.command("build", cls=Command, short_help="为指定的 SM 建 TensorRT 引擎")
@bundle_argument
@click.option(
    "--arch",
    "arches",
    required=True,
    metavar="SM",
    help="目标 SM，几个用逗号隔开：sm89,sm120；sm 可以不写。OUT 是一套 stage 时一个 stage 一个，或只给一个。",
)
@click.option(
    "--flavour",
    type=click.Choice(list(FLAVOURS)),
    help="用哪种 TensorRT；缺省用装了的那个，先看 rtx。",
)
@click.option(
    "--profile-shapes",
    "shapes",
    default="",
    metavar="SHAPES",
    help="B=最小:最优:最大,S=最优:最大,T=缓存容量；缺省 B=1:1:8,S=128:512,T=4096（不超过模型的 max_position_embeddings）。",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="要另导出时从哪里读检查点；缺省是 manifest 里记的出处。",
)
@verify_weights_option(True)
@json_option
def command(
    bundle: Path,
    arches: str,
    flavour: FlavourName | None,
    shapes: str,
    checkpoint: Path | None,
    verify_weights: bool,
    as_json: bool,
) -> None:
    """为 bundle OUT 建 TensorRT 引擎，写进 OUT/engines/；TensorRT-RTX 不需要 GPU。

    每种 SM 一个目录：model.plan（有 MTP 时还有 mtp.plan）、layers.json（引擎的每一层从哪些 ONNX 节点来，哪些是 dsx
    插件）、engine.json，以及解析时用的 ONNX。有两个优化配置：decode（一次至多 8 个 token）与 prefill。预期的插件有一个没有留在
    引擎里就失败。

    引擎只由 TensorRT 目标的 float16、bfloat16 bundle 建。别的（portable、ort-cpu、float32）由检查点以同样的方案与量化另导出一份，
    放在 OUT/engines/bundle/，引擎在它里面；--backend trt 会自己找到。检查点要在，挪过地方用 --checkpoint 指。

    OUT 也可以是一套 stage：每个 stage 建一个引擎，在 OUT/stage.N/engines/ 里，形状都相同。

    \b
    例：
      dsx build OUT --arch sm89
      dsx build OUT --arch sm80,sm89,sm120 --profile-shapes B=1:1:4,S=256:1024,T=8192
      dsx build OUT --arch sm90 --flavour tensorrt
      dsx build STAGES --arch 89,89,120,120
    """
    sms = [parse_arch(arch) for arch in arches.split(",")]
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        built = api.build(
            bundle,
            sms,
            flavour=flavour,
            shapes=shapes,
            checkpoint=checkpoint,
            verify_weights=verify_weights,
            progress=progress,
        )
    if as_json:
        echo_json([_summary(engine) for engine in built])
        return
    for engine in built:
        _print(engine)
    source = built[0].bundle
    if (
        source.manifest.stage is None
        and source.path != bundle
        and not (source.path / "reports/parity.json").is_file()
    ):
        click.echo(f"另导出的这一份还没有校验过。下一步：dsx verify {shlex.quote(str(source.path))}")


def _summary(engine: BuiltEngine) -> dict[str, Any]:
    return {"path": str(engine.path), **engine.record.model_dump(mode="json")}


def _print(engine: BuiltEngine) -> None:
    record = engine.record
    numbers = ("层数", "插件层")
    made = table(
        f"{engine.path}（{record.flavour} {record.version}）",
        *("文件", "配置", *numbers, "插件", "其余"),
        right=numbers,
    )
    for name, entry in record.plans.items():
        for profile, counts in entry.layers.items():
            plugins = {kind: n for kind, n in counts.items() if kind.startswith("dsx::")}
            others = {kind: n for kind, n in counts.items() if kind not in plugins}
            made.add_row(
                name,
                profile,
                str(sum(counts.values())),
                str(sum(plugins.values())),
                _counts(plugins),
                _counts(others),
            )
    out = console()
    out.print(made)
    shapes = record.shapes
    rows = [
        (
            "形状",
            f"B {':'.join(map(str, shapes.batch))}，prefill S {shapes.prefill}，缓存容量 {shapes.capacity}",
        ),
        ("大小", "，".join(f"{name} {size(entry.bytes)}" for name, entry in record.plans.items())),
        *((f"{name} 解码的插件层", _names(found["decode"])) for name, found in engine.layers.items()),
        *((f"{name} prefill 的融合注意力", _fused(entry)) for name, entry in record.plans.items()),
        (
            "用时",
            f"{sum(entry.seconds for entry in record.plans.values()):.1f} s，"
            f"峰值内存 {size(record.peak_rss_bytes)}",
        ),
    ]
    out.print(facts("", rows))


def _names(layers: list[EngineLayer]) -> str:
    names = [layer.onnx[0] for layer in layers if layer.op]
    more = f" 等 {len(names)} 个" if len(names) > _SHOWN else ""
    return "、".join(names[:_SHOWN]) + more or "没有"


def _fused(entry: EngineEntry) -> str:
    unfused = entry.unfused_attention
    total = entry.fused_attention + len(unfused)
    if not total:
        return "没有：prefill 路径上没有 Attention 节点"
    missed = f"，没有融合的：{'、'.join(unfused[:_SHOWN])}" if unfused else ""
    return f"{entry.fused_attention} / {total} 层{missed}"


def _counts(counts: dict[str, int]) -> str:
    return "、".join(f"{kind}×{n}" for kind, n in counts.items()) or "-"
