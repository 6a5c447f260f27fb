"""``dsx plan --cluster`` 的话与网页的一节：各种分法、每台放多少、模拟可信到什么程度。"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek_export.report.bars import Stack, stack_chart
from deepseek_export.report.page import Cell, Code, Number, Section, Table, Verdict, integer, nbytes
from deepseek_export.report.speeds import SPLITS, speed
from deepseek_export.report.svg import Picture
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.plan.result import ClusterPlan, LayoutPlan, ModelError, Validation

BOUNDS = {"memory": "内存带宽", "compute": "算力", "network": "网络带宽", "latency": "网络延迟"}
_HELD = ("stage", "流水线", "没用上的", "每条的序列", "最满的一台", "切在哪里")
_SPEEDS = (
    "stage",
    "小批",
    "单条不超过",
    "单条受限于",
    "合计不超过",
    "合计受限于",
    "最忙的 stage 在算",
    "首个 token 至少",
)


def described(plan: ClusterPlan) -> list[tuple[str, str]]:
    """机器与网络。"""
    flops = "没有写" if plan.flops is None else f"{plan.flops / 1e12:g} TFLOP/s"
    found = [
        ("机器", f"{plan.count} 台 {plan.machine}"),
        (
            "每台",
            f"可用 {size(plan.usable_bytes)}，内存带宽 {plan.memory_bandwidth / 1e9:g} GB/s，算力 {flops}",
        ),
    ]
    if plan.link_bandwidth is not None and plan.link_latency is not None:
        network = f"{plan.link_bandwidth * 8 / 1e9:g} Gb/s，{plan.link_latency * 1e6:g} us"
        found.append(("网络", network))
    return found


def least_machines(plan: ClusterPlan) -> str:
    """放不放得下。"""
    if plan.smallest is None:
        return "放不下：有一层自己就超过一台"
    if not plan.layouts:
        return f"放不下：至少 {plan.smallest} 台"
    return f"至少 {plan.smallest} 台"


def trust(validation: Validation) -> str:
    """模拟对照过测量没有，差多少。"""
    again = "重复：python -m perf run cluster-model"
    if not validation.errors:
        return f"模拟还没有对照过测量；{again}"
    cases = "；".join(f"{error.case} {_error(error)}" for error in validation.errors)
    return (
        f"模拟对照过本机的测量（{validation.machine}，{validation.measured}），预测与量到的一步之比："
        f"{cases}。更多的机器、真的网络没有对照过；{again}"
    )


def _error(error: ModelError) -> str:
    return f"{error.median:.2f}（{error.low:.2f}–{error.high:.2f}）"


def bound(value: str | None) -> str:
    """受限于什么。"""
    return "-" if value is None else BOUNDS[value]


def seconds(value: float | None) -> str:
    """三位有效数字的秒。"""
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def fullest(layout: LayoutPlan) -> int:
    """最满的一台放多少字节。"""
    return max(one.weight_bytes + one.cache_bytes for one in layout.stage_plans)


def cluster_section(plan: ClusterPlan) -> Section:
    """网页的一节。"""
    tables, pictures = [], []
    if plan.layouts:
        failed = frozenset(index for index, layout in enumerate(plan.layouts) if not layout.fits)
        tables.append(Table("流水线的各种分法", _HELD, [_layout(one) for one in plan.layouts], failed))
        tables.append(Table("多快（模拟）", _SPEEDS, [_speeds(one) for one in plan.layouts], failed))
        shown = plan.layouts[plan.best or 0]
        pictures.append(_picture(plan, shown))
        tables.append(_stages(plan, shown))
    if plan.estimates:
        tables.append(_estimates(plan))
    facts: list[tuple[str, Cell]] = [*described(plan), ("放不放得下", least_machines(plan))]
    lead = [trust(plan.validation)]
    if plan.layouts:
        lead.append("条是每一台放的权重与缓存，虚线是一台能放的；画的是合计最快的那种分法。")
    return Section(f"集群：{plan.text}", lead, facts, pictures, tables, plan.assumptions)


def _layout(layout: LayoutPlan) -> list[Cell]:
    return [
        integer(layout.stages),
        integer(layout.replicas),
        integer(layout.idle),
        integer(layout.batch),
        nbytes(fullest(layout)),
        Code(layout.cuts),
    ]


def _speeds(layout: LayoutPlan) -> list[Cell]:
    busiest = layout.busiest
    return [
        integer(layout.stages),
        integer(layout.micro_batches),
        Number(layout.single_tokens_per_second, speed(layout.single_tokens_per_second)),
        bound(layout.single_bound),
        Number(layout.full_tokens_per_second, speed(layout.full_tokens_per_second)),
        bound(layout.full_bound),
        Number(busiest, "-" if busiest is None else f"{busiest:.0%}"),
        Number(layout.first_token_s, seconds(layout.first_token_s)),
    ]


def _stages(plan: ClusterPlan, layout: LayoutPlan) -> Table:
    rows: list[list[Cell]] = [
        [
            f"stage {index}",
            f"{one.first_layer}–{one.last_layer}",
            nbytes(one.weight_bytes),
            nbytes(one.cache_bytes),
            nbytes(one.weight_bytes + one.cache_bytes),
            Verdict(_fits(plan, index, layout), "放得下" if _fits(plan, index, layout) else "放不下"),
        ]
        for index, one in enumerate(layout.stage_plans)
    ]
    return Table(
        f"{layout.stages} 个 stage 各放多少",
        ("", "层", "权重", "缓存", "合计", f"每台 {size(plan.usable_bytes)}"),
        rows,
    )


def _fits(plan: ClusterPlan, index: int, layout: LayoutPlan) -> bool:
    one = layout.stage_plans[index]
    return one.weight_bytes + one.cache_bytes <= plan.usable_bytes


def _picture(plan: ClusterPlan, layout: LayoutPlan) -> Picture:
    stacks = [
        Stack(
            f"stage {index}",
            (one.weight_bytes, one.cache_bytes),
            f"第 {one.first_layer}–{one.last_layer} 层，权重 {size(one.weight_bytes)} + 缓存 {size(one.cache_bytes)}",
            float(plan.usable_bytes),
            _fits(plan, index, layout),
        )
        for index, one in enumerate(layout.stage_plans)
    ]
    return stack_chart(
        f"{layout.stages} 个 stage",
        f"每台可用 {size(plan.usable_bytes)}；"
        + "；".join(f"{one.name}：{one.shown}" for one in stacks)
        + "。",
        stacks,
        ("权重", "缓存"),
        limit_name=f"每台可用 {size(plan.usable_bytes)}",
        slots=(1, 2),
    )


def _estimates(plan: ClusterPlan) -> Table:
    rows: list[list[Cell]] = [
        [
            SPLITS[one.split],
            integer(one.machines),
            nbytes(one.weight_bytes),
            nbytes(one.cache_bytes),
            Verdict(one.fits, "放得下" if one.fits else "放不下"),
            Number(one.bound_tokens_per_second, speed(one.bound_tokens_per_second)),
            Number(one.tokens_per_second, speed(one.tokens_per_second)),
        ]
        for one in plan.estimates
    ]
    columns = ("切法", "台数", "每台权重", "每台缓存", "放得下", "不计通信，不超过", "计通信，约")
    return Table("估计：没有模拟，没有对照过", columns, rows)
