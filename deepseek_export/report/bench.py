"""``dsx bench --html`` 的页：上下文与一步的时间，生成的快慢，内存。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deepseek_export.report.bars import Bar, Group, bar_chart
from deepseek_export.report.lines import Axis, Line, Point, line_chart
from deepseek_export.report.page import Cell, Code, Number, Page, Section, Table, nbytes
from deepseek_export.report.svg import Picture
from deepseek_export.units import gigabytes, size

if TYPE_CHECKING:
    from deepseek_export.benchmark.bundle import BenchReport
    from deepseek_export.benchmark.depth_steps import Depth
    from deepseek_export.benchmark.spread import Spread

_NAMES = {"bundle": "被测", "against": "对照", "plain": "逐个 token", "speculative": "投机"}
_SLOTS = {"bundle": 1, "against": 0}
#: 散布至多画到最大的中位数的几倍。
_HEADROOM = 2.5
_MEMORY = {
    "cache_computed": "算出的缓存",
    "cache_resident": "实测的缓存",
    "loaded": "加载后",
    "resident": "解码时",
    "peak": "峰值",
}


def way_name(name: str) -> str:
    """``bundle/plain`` → 「被测 逐个 token」。"""
    return " ".join(_NAMES.get(part, part) for part in name.split("/"))


def ratio_name(what: str, numerator: str, denominator: str) -> str:
    """一个比值叫什么。"""
    shown = what.replace("depth", "上下文").replace("decode", "解码")
    return f"{shown}：{way_name(numerator)} / {way_name(denominator)}"


def bench_page(report: BenchReport) -> Page:
    """``dsx bench`` 的结果。"""
    cpu, scenario = report.environment["cpu"], report.scenario
    facts: list[tuple[str, Cell]] = [
        (way_name(name), f"{one.path}（{one.profile}，{one.target}，{one.dtype}）")
        for name, one in report.subjects.items()
    ]
    memory = report.environment["memory_bytes"]
    load = report.environment["load_average"]
    facts += [
        ("CPU", f"{cpu['model'] or cpu['machine']}，{cpu['cores']} 核，线程 {scenario.threads or '自动'}"),
        ("内存", "未知" if memory is None else size(memory)),
        ("开始时的负载", "未知" if load is None else f"{load:.2f}"),
        (
            "场景",
            f"batch {scenario.batch}，提示词 {scenario.prompt_len}，新 token {scenario.new_tokens}，{scenario.runs} 遍",
        ),
        (
            "版本",
            "、".join(
                f"{name} {version or '未装'}" for name, version in report.environment["libraries"].items()
            ),
        ),
    ]
    lead = ["每个数是几遍的中位数与范围；要比的几种跑法交替进行，机器变快变慢时一起变。"]
    sections = [
        Section("上下文与一步的时间", lead, pictures=[_depths(report)], tables=_depth_tables(report)),
        Section("生成", pictures=_ways(report), tables=[_way_table(report)], notes=_notes(report)),
        Section(
            f"内存（上下文 {max(scenario.depths)}）", pictures=_memory(report), tables=[_memory_table(report)]
        ),
    ]
    if report.ratios:
        sections.append(_ratios(report))
    return Page(f"dsx bench：{report.subjects['bundle'].path}", None, facts, sections)


def _depths(report: BenchReport) -> Picture:
    depths = sorted(report.depths, key=lambda depth: depth.context)
    contexts = [depth.context for depth in depths]
    lines = [
        Line(way_name(name), [_point(one, name) for one in depths], _SLOTS[name]) for name in report.subjects
    ]
    points = [point for line in lines for point in line.points]
    # 机器忙的时候一遍能慢几十倍；让它定尺度，中位数就挤成一条线了。
    top = min(max(point.high for point in points), _HEADROOM * max(point.y for point in points))
    cut = "，顶到头的散布超出了图" if any(point.high > top for point in points) else ""
    ends = "；".join(f"{line.name}从 {line.points[0].note} 到 {line.points[-1].note}" for line in lines)
    return line_chart(
        "解码一步的时间与上下文",
        f"上下文 {contexts[0]} 到 {contexts[-1]} 个 token，一步的毫秒数，带子是最小到最大：{ends}。数在旁边的表里。",
        lines,
        Axis("上下文（token，对数）", logarithmic=True, ticks=contexts),
        Axis(f"一步（ms{cut}）", top=top * 1.05),
        better="越低越好",
    )


def _point(depth: Depth, name: str) -> Point:
    step = depth.step_s[name]
    return Point(
        depth.context, step.median * 1e3, step.low * 1e3, step.high * 1e3, f"{step.median * 1e3:.2f} ms"
    )


def _depth_tables(report: BenchReport) -> list[Table]:
    rows = [
        [f"{depth.context}，{way_name(name)}", *_times(step)]
        for depth in report.depths
        for name, step in depth.step_s.items()
    ]
    return [
        Table("各上下文的一步", ("上下文", "中位数", "最小", "最大", "每一遍"), rows),
        _read_table(report),
    ]


def _read_table(report: BenchReport) -> Table:
    rows: list[list[Cell]] = [
        [
            f"{depth.context}，{way_name(name)}",
            nbytes(read.weight_bytes),
            nbytes(read.cache_bytes),
            _rate(read.bytes_per_second),
            _rate(depth.machine_bytes_per_second),
            "不知道" if read.share is None else Number(read.share.median, f"{read.share.median:.1%}"),
        ]
        for depth in report.depths
        for name, read in depth.reads.items()
    ]
    return Table("一步读多少", ("上下文", "权重", "缓存", "每秒读", "这台机器每秒读得动", "占"), rows)


def _rate(spread: Spread | None) -> Cell:
    return "不知道" if spread is None else Number(spread.median, gigabytes(spread.median))


def _ways(report: BenchReport) -> list[Picture]:
    made = []
    for title, field, unit in (
        ("每个 token 的时间", "token_s", "解码"),
        ("prefill 的时间", "prefill_s", "整批"),
    ):
        bars = [
            _bar(way_name(name), getattr(way, field), _SLOTS[name.partition("/")[0]])
            for name, way in report.ways.items()
        ]
        shown = "；".join(f"{bar.name} {bar.shown}" for bar in bars)
        made.append(bar_chart(title, f"{shown}。短的好。", [Group("", bars)], note=f"{unit}，ms，↓ 越低越好"))
    return made


def _bar(name: str, spread: Spread, slot: int) -> Bar:
    ms = spread.scaled(1e3)
    return Bar(name, ms.median, ms.low, ms.high, f"{ms.median:.3g} ms", slot)


def _way_table(report: BenchReport) -> Table:
    rows: list[list[Cell]] = []
    for name, way in report.ways.items():
        rate = 1 / way.token_s.median
        rows.append(
            [
                way_name(name),
                *_times(way.prefill_s)[:3],
                *_times(way.token_s)[:3],
                Number(rate, f"{rate:.1f}"),
                _acceptance(way.speculation),
            ]
        )
    columns = (
        "跑法",
        "prefill",
        "最小",
        "最大",
        "每个 token",
        "最小",
        "最大",
        "token/s",
        "各草稿的条件接受率",
    )
    return Table("生成", columns, rows)


def _acceptance(speculation: dict[str, Any] | None) -> str:
    """各个草稿的；一次也没有轮到的草稿没有接受率。"""
    found = (speculation or {}).get("acceptance", ())
    return "、".join("没有轮到" if share is None else f"{share:.1%}" for share in found) or "-"


def _notes(report: BenchReport) -> list[str]:
    return [f"{way_name(name)}：{line}" for name, way in report.ways.items() for line in way.notes]


def _memory(report: BenchReport) -> list[Picture]:
    groups = [
        Group(
            way_name(name),
            [
                Bar(shown, value, value, value, size(value), slot)
                for slot, (field, shown) in enumerate(_MEMORY.items(), 1)
                if (value := getattr(subject.memory, field)) is not None
            ],
        )
        for name, subject in report.subjects.items()
        if subject.memory is not None
    ]
    if not groups:
        return []
    description = "；".join(
        f"{g.name}：" + "，".join(f"{bar.name} {bar.shown}" for bar in g.bars) for g in groups
    )
    return [bar_chart("进程的内存", f"{description}。", groups, note="↓ 越低越好")]


def _memory_table(report: BenchReport) -> Table:
    rows: list[list[Cell]] = []
    for name, subject in report.subjects.items():
        values = [getattr(subject.memory, field, None) for field in _MEMORY]
        rows.append(
            [way_name(name), *map(nbytes, values), nbytes(subject.cache_bytes_per_token), Code(subject.path)]
        )
    return Table("内存", ("", *_MEMORY.values(), "缓存，每个 token", "bundle"), rows)


def _ratios(report: BenchReport) -> Section:
    bars, rows = [], []
    for ratio in report.ratios:
        value = ratio.value
        name = ratio_name(ratio.what, ratio.numerator, ratio.denominator)
        bars.append(Bar(name, value.median, value.low, value.high, f"{value.median:.3f}", 1))
        row: list[Cell] = [
            name,
            *(Number(one, f"{one:.3f}") for one in (value.median, value.low, value.high)),
        ]
        rows.append(row)
    shown = "；".join(f"{bar.name} {bar.shown}" for bar in bars)
    picture = bar_chart(
        "比值（前者 / 后者）",
        f"{shown}。小于 1 是前者快。",
        [Group("", bars)],
        note="逐对相除，↓ 越低越好",
        rule=(1.0, "1：一样快"),
    )
    table = Table("比值", ("", "中位数", "最小", "最大"), rows)
    return Section("比值（小于 1 是前者快）", pictures=[picture], tables=[table])


def _times(spread: Spread) -> list[Cell]:
    """秒：中位数、最小、最大，与每一遍。"""
    numbers: list[Cell] = [Number(v, f"{v * 1e3:.3g} ms") for v in (spread.median, spread.low, spread.high)]
    return [*numbers, "、".join(f"{value * 1e3:.3g}" for value in spread.samples) + " ms"]
