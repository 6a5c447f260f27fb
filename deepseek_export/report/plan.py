"""``dsx plan`` 的话与页：每块卡放多少、界线在哪里，导出要多少。"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_export.report.bars import Bar, Group, Stack, bar_chart, stack_chart
from deepseek_export.report.cluster_plan import cluster_section
from deepseek_export.report.page import Cell, Code, Number, Page, Section, Table, Verdict, integer, nbytes
from deepseek_export.report.speeds import SPLITS, speed
from deepseek_export.report.svg import Picture
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.plan.result import GpuPlan, Plan, SplitPlan

BOUNDS = {"memory": "受带宽限制", "compute": "受算力限制"}
_CACHES = {"latent": "潜向量", "expanded": "展开"}


def least(gpu: GpuPlan) -> str:
    """至少几块，没有切法的原因，多快。"""
    words = "128 块也不够"
    if gpu.smallest is not None:
        words = f"至少 {gpu.smallest.gpus} 块（{SPLITS[gpu.smallest.split]}）"
    if gpu.no_split is not None:
        words += f"；{gpu.no_split}"
    if gpu.decode_split is not None and gpu.decode_bound is not None:
        words += (
            f"；解码不超过 {speed(gpu.decode_tokens_per_second)}"
            f"（{SPLITS[gpu.decode_split]}，{BOUNDS[gpu.decode_bound]}），"
            f"prefill 不超过 {speed(gpu.prefill_tokens_per_second)}"
        )
    return words


def plan_page(plan: Plan) -> Page:
    """``dsx plan`` 的结果。"""
    mtp = f"，MTP 模块 {plan.mtp_modules} 个" if plan.mtp_modules else ""
    facts: list[tuple[str, Cell]] = [
        ("检查点", Code(plan.checkpoint)),
        ("模型", f"{plan.family}，{plan.layers} 层，其中 MoE {plan.moe_layers} 层{mtp}"),
        ("方案", plan.profile),
        ("参数", integer(plan.parameters)),
        ("每个 token 用到", integer(plan.active_parameters)),
        ("场景", f"batch {plan.batch} × {plan.context} token，显存里的权重 {plan.weights}"),
    ]
    sections = [_gpus(plan)] if plan.gpus else []
    if plan.cluster is not None:
        sections.append(cluster_section(plan.cluster))
    sections += [_weights(plan), _cache(plan), _export(plan), Section("假设", notes=plan.assumptions)]
    return Page(f"dsx plan：{plan.checkpoint}", None, facts, sections)


def _gpus(plan: Plan) -> Section:
    pictures = [_card(gpu) for gpu in plan.gpus if gpu.requested]
    rows: list[list[Cell]] = []
    failed = set()
    for gpu in plan.gpus:
        for split in gpu.requested:
            if not split.fits:
                failed.add(len(rows))
            rows.append(_split(gpu, split))
    columns = (
        "GPU",
        "切法",
        "卡数",
        "每卡权重",
        "每卡缓存",
        "合计",
        "每卡可用",
        "放得下",
        "解码不超过",
        "受什么限制",
    )
    tables = [Table("每一种切法", columns, rows, frozenset(failed))] if rows else []
    minimum: list[list[Cell]] = [
        [
            gpu.title,
            "128 块也不够" if gpu.smallest is None else integer(gpu.smallest.gpus),
            "-" if gpu.smallest is None else SPLITS[gpu.smallest.split],
            *_rate(gpu.decode_tokens_per_second),
            *_rate(gpu.prefill_tokens_per_second),
            gpu.no_split or "",
        ]
        for gpu in plan.gpus
    ]
    tables.append(
        Table(
            "至少几块，多快",
            ("GPU", "至少几块", "切法", "解码不超过", "prefill 不超过", "没有切法的原因"),
            minimum,
        )
    )
    lead = [
        "条是最满的那块卡放的权重与缓存，虚线是这块卡能放的：显存留出一成给激活与工作区。越过虚线就放不下。"
    ]
    return Section("放不放得下", lead, pictures=pictures, tables=tables)


def _card(gpu: GpuPlan) -> Picture:
    stacks = [
        Stack(
            SPLITS[split.split],
            (split.weight_bytes, split.cache_bytes),
            f"权重 {size(split.weight_bytes)} + 缓存 {size(split.cache_bytes)}，"
            + (f"解码不超过 {speed(split.decode_tokens_per_second)}" if split.fits else "放不下"),
            float(gpu.usable_bytes),
            split.fits,
        )
        for split in gpu.requested
    ]
    count = gpu.requested[0].gpus
    title = f"{gpu.title} × {count}"
    return stack_chart(
        title,
        f"每块卡可用 {size(gpu.usable_bytes)}；"
        + "；".join(f"{stack.name}：{stack.shown}" for stack in stacks)
        + "。",
        stacks,
        ("每卡权重", "每卡缓存"),
        limit_name=f"每卡可用 {size(gpu.usable_bytes)}",
        slots=(1, 2),
    )


def _split(gpu: GpuPlan, split: SplitPlan) -> list[Cell]:
    return [
        gpu.title,
        SPLITS[split.split],
        integer(split.gpus),
        nbytes(split.weight_bytes),
        nbytes(split.cache_bytes),
        nbytes(split.weight_bytes + split.cache_bytes),
        nbytes(gpu.usable_bytes),
        Verdict(split.fits, "放得下" if split.fits else "放不下"),
        *_rate(split.decode_tokens_per_second),
        "-" if split.decode_bound is None else BOUNDS[split.decode_bound],
    ]


def _rate(value: float | None) -> list[Cell]:
    return [Number(value, "-" if value is None else speed(value))]


def _weights(plan: Plan) -> Section:
    bars = [
        Bar(
            {"stored": "检查点原样"}.get(kind, kind),
            value,
            value,
            value,
            size(value),
            1 if kind == plan.weights else 0,
        )
        for kind, value in plan.weight_bytes.items()
    ]
    shown = "，".join(f"{bar.name} {bar.shown}" for bar in bars)
    picture = bar_chart(
        "整个模型的权重", f"{shown}。", [Group("", bars)], note="↓ 越低越好；蓝色的是估算用的"
    )
    kinds = Table(
        "换成别的 dtype",
        ("dtype", "字节"),
        [[kind, nbytes(value)] for kind, value in plan.weight_bytes.items()],
    )
    stored = Table(
        "检查点里的张量",
        ("dtype", "张量", "字节"),
        [[entry.dtype, integer(entry.tensors), nbytes(entry.bytes)] for entry in plan.stored],
    )
    lead = [f"检查点是 4 位的：{plan.int4}。"] if plan.int4 else []
    return Section("权重", lead, pictures=[picture], tables=[kinds, stored])


def _cache(plan: Plan) -> Section:
    cache = plan.cache
    sizes = {"latent": cache.latent_bytes, "expanded": cache.expanded_bytes}
    each = {"latent": cache.latent_bytes_per_token, "expanded": cache.expanded_bytes_per_token}
    bars = [
        Bar(_CACHES[kind], value, value, value, size(value), 1 if kind == cache.used else 0)
        for kind, value in sizes.items()
    ]
    at = f"batch {plan.batch} × {plan.context} token"
    shown = "，".join(f"{bar.name} {bar.shown}" for bar in bars)
    picture = bar_chart(
        f"KV 缓存，{at}",
        f"{shown}；方案用{_CACHES[cache.used]}的。",
        [Group("", bars)],
        note="↓ 越低越好；蓝色的是方案用的",
    )
    rows: list[list[Cell]] = [
        [_CACHES[kind], nbytes(each[kind]), nbytes(sizes[kind]), "方案用这一种" if kind == cache.used else ""]
        for kind in sizes
    ]
    table = Table(f"KV 缓存（{cache.dtype}）", ("形式", "每个 token", at, ""), rows)
    return Section("KV 缓存", pictures=[picture], tables=[table])


def _export(plan: Plan) -> Section:
    rows: list[list[Cell]] = [
        [f"导出 {one.mode} {one.dtype}", nbytes(one.disk_bytes), nbytes(one.peak_ram_bytes)]
        for one in plan.export
    ]
    rows.append(["建引擎 float16", nbytes(plan.build.disk_bytes), nbytes(plan.build.peak_ram_bytes)])
    return Section("导出与建引擎", tables=[Table("要多少磁盘与内存", ("做什么", "磁盘", "内存峰值"), rows)])
