"""``dsx plan``。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import checkpoint_argument, counts, html_option, json_option, set_option
from deepseek_export.report.plan import SPLITS, least, plan_page, speed
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.plan import Plan

KINDS = ("stored", "float32", "float16", "int8", "int4")


@click.command("plan", cls=Command, short_help="动工之前：多大、放不放得下、多快")
@checkpoint_argument
@click.option("-p", "--profile", default="mla+moe", show_default=True, help="优化方案。")
@click.option(
    "--gpu", "gpus", metavar="NAME,...", default="", help="GPU，逗号分隔，不分大小写，例如 h100,rtx4090。"
)
@click.option("--gpus", "count", type=counts(), default=1, show_default=True, help="每种有几块。")
@click.option("--batch", type=counts(), default=1, show_default=True, help="同时生成几条序列。")
@click.option("--context", type=counts(), help="每条多少个 token；缺省 4096，不超过模型的最大长度。")
@click.option(
    "--weights",
    type=click.Choice(KINDS),
    default="stored",
    show_default=True,
    help="显存里权重的 dtype；stored 是检查点里的原样。",
)
@set_option
@html_option
@json_option
def command(
    checkpoint: Path,
    profile: str,
    gpus: str,
    count: int,
    batch: int,
    context: int | None,
    weights: Any,
    overrides: tuple[str, ...],
    html: Path | None,
    as_json: bool,
) -> None:
    """估算检查点 CKPT：权重、KV 缓存、导出要的内存与磁盘；给了 --gpu 再算放不放得下、怎么切、每秒多少 token 的上界。

    只读 config.json 与 safetensors 文件头，几百 GB 的检查点也只要一两秒。估算用的假设列在最后。

    \b
    例：
      dsx plan CKPT
      dsx plan CKPT --gpu h100,rtx4090 --gpus 8 --batch 32 --context 8192
    """
    from deepseek_export.plan import make_plan
    from deepseek_export.profile import resolve_profile

    plan = make_plan(
        checkpoint,
        resolve_profile(profile, overrides),
        gpus=[name.strip() for name in gpus.split(",") if name.strip()],
        count=count,
        batch=batch,
        context=context,
        weights=weights,
    )
    if as_json:
        echo_json(plan.model_dump(mode="json"))
    else:
        _print(plan)
    write_html(html, as_json, plan_page, plan)


def _print(plan: Plan) -> None:
    out = console()
    mtp = f"，MTP 模块 {plan.mtp_modules} 个" if plan.mtp_modules else ""
    stored = "、".join(f"{entry.dtype} {size(entry.bytes)}（{entry.tensors} 个）" for entry in plan.stored)
    others = "、".join(
        f"{kind} {size(value)}" for kind, value in plan.weight_bytes.items() if kind != "stored"
    )
    cache, at = plan.cache, f"batch {plan.batch} × {plan.context} token"
    used = {"latent": "潜向量", "expanded": "展开"}[cache.used]
    out.print(
        facts(
            plan.checkpoint,
            [
                ("模型", f"{plan.family}，{plan.layers} 层，其中 MoE {plan.moe_layers} 层{mtp}"),
                ("方案", plan.profile),
                ("参数", f"{plan.parameters:,}，每个 token 用到 {plan.active_parameters:,}"),
                ("权重", stored),
                ("换成", others),
                (
                    "KV 缓存",
                    f"每个 token {cache.latent_bytes_per_token:,} 字节（展开是 {cache.expanded_bytes_per_token:,}），"
                    f"{cache.dtype}；方案用{used}的",
                ),
                (at, f"{size(cache.latent_bytes)}（展开是 {size(cache.expanded_bytes)}）"),
                *(
                    (
                        f"导出 {e.mode} {e.dtype}",
                        f"磁盘 {size(e.disk_bytes)}，峰值内存不超过 {size(e.peak_ram_bytes)}",
                    )
                    for e in plan.export
                ),
                (
                    "建引擎 float16",
                    f"磁盘 {size(plan.build.disk_bytes)}，峰值内存约 {size(plan.build.peak_ram_bytes)}",
                ),
            ],
        )
    )
    if plan.gpus:
        out.print()
        if any(gpu.requested for gpu in plan.gpus):
            out.print(_gpu_table(plan))
            out.print()
        out.print(_gpu_facts(plan))
    click.echo()
    for line in plan.assumptions:
        click.echo(f"假设：{line}")


def _gpu_table(plan: Plan) -> Any:
    numbers = ("卡数", "每卡权重", "每卡缓存", "每卡可用", "解码不超过")
    made = table(
        f"权重 {plan.weights}，batch {plan.batch} × {plan.context} token",
        *("GPU", "切法", *numbers),
        right=numbers,
        optional=("每卡可用",),
    )
    for gpu in plan.gpus:
        for split in gpu.requested:
            made.add_row(
                gpu.title,
                SPLITS[split.split],
                str(split.gpus),
                size(split.weight_bytes),
                size(split.cache_bytes),
                size(gpu.usable_bytes),
                speed(split.decode_tokens_per_second),
            )
    return made


def _gpu_facts(plan: Plan) -> Any:
    return facts("至少几块，多快", [(gpu.title, least(gpu)) for gpu in plan.gpus])
