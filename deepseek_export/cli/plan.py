"""``dsx plan``。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import checkpoint_argument, counts, html_option, json_option, set_option
from deepseek_export.report.cluster_plan import bound, described, fullest, least_machines, seconds, trust
from deepseek_export.report.plan import least, plan_page
from deepseek_export.report.speeds import SPLITS, speed
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.plan import Plan
    from deepseek_export.plan.result import ClusterPlan

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
@click.option(
    "--cluster",
    metavar="SPEC",
    help="几台机器、什么网络，例如 '8x h100 80GB, 400Gb/s'、'4x cpu 256GB 300GB/s 2TFLOP/s, 10Gb/s 50us'：切成 stage，模拟流水线。",
)
@click.option("--stages", type=counts(), help="配 --cluster：只看切成这么多个 stage 的；缺省各种都看。")
@click.option("--prompt", type=counts(), help="配 --cluster：提示词多少个 token；缺省是 --context 的一半。")
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
    cluster: str | None,
    stages: int | None,
    prompt: int | None,
    overrides: tuple[str, ...],
    html: Path | None,
    as_json: bool,
) -> None:
    """估算检查点 CKPT：权重、KV 缓存、导出要的内存与磁盘；给了 --gpu 再算放不放得下、怎么切、每秒多少 token 的上界；
    给了 --cluster 再切成 stage，模拟几台机器上的流水线：每台放多少、单条与合计多快、等第一个 token 多久、受限于什么。

    只读 config.json 与 safetensors 文件头，几百 GB 的检查点也只要一两秒。估算用的假设列在最后。

    \b
    例：
      dsx plan CKPT
      dsx plan CKPT --gpu h100,rtx4090 --gpus 8 --batch 32 --context 8192
      dsx plan CKPT --cluster "8x h100 80GB, 400Gb/s" --batch 64
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
        cluster=cluster,
        stages=stages,
        prompt=prompt,
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
                *([("检查点的量化", plan.int4)] if plan.int4 else []),
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
    if plan.cluster is not None:
        out.print()
        _print_cluster(plan.cluster)
    click.echo()
    for line in [*plan.assumptions, *(plan.cluster.assumptions if plan.cluster else ())]:
        click.echo(f"假设：{line}")


def _print_cluster(plan: ClusterPlan) -> None:
    out = console()
    rows = [*described(plan), ("放不放得下", least_machines(plan))]
    if plan.best is not None:
        best = plan.layouts[plan.best]
        rows.append(
            (
                "合计最快的",
                f"dsx split OUT --stages {best.cuts}，每条流水线 --micro-batches {best.micro_batches}",
            )
        )
    rows.append(("可信吗", trust(plan.validation)))
    out.print(facts(f"集群 {plan.text}", rows))
    if plan.layouts:
        out.print()
        out.print(_layout_table(plan))
    if plan.estimates:
        out.print()
        out.print(_estimate_table(plan))


def _layout_table(plan: ClusterPlan) -> Any:
    numbers = ("stage", "流水线", "小批", "最满的一台", "单条不超过", "合计不超过", "首个 token 至少")
    made = table(
        f"流水线（模拟）：提示词 {plan.prompt} token",
        *(*numbers[:5], "受限于", numbers[5], "受限于 ", numbers[6]),
        right=numbers,
        optional=("小批", "首个 token 至少"),
    )
    for layout in plan.layouts:
        made.add_row(
            str(layout.stages),
            f"{layout.replicas} 条" + (f"，剩 {layout.idle} 台" if layout.idle else ""),
            str(layout.micro_batches),
            size(fullest(layout)),
            speed(layout.single_tokens_per_second),
            bound(layout.single_bound),
            speed(layout.full_tokens_per_second),
            bound(layout.full_bound),
            seconds(layout.first_token_s),
        )
    return made


def _estimate_table(plan: ClusterPlan) -> Any:
    numbers = ("每台权重", "每台缓存", "不计通信，不超过", "计通信，约")
    made = table("全部机器一起做的（估计：没有模拟，没有对照过）", "切法", *numbers, right=numbers)
    for one in plan.estimates:
        made.add_row(
            SPLITS[one.split],
            size(one.weight_bytes),
            size(one.cache_bytes),
            speed(one.bound_tokens_per_second),
            speed(one.tokens_per_second),
        )
    return made


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
