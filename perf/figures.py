"""报告与文档里的图：每套几张，画法在 :mod:`deepseek_export.report`，一份 SVG 随看的人的主题变，文字是文字。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from deepseek_export.benchmark.spread import Spread
from deepseek_export.report.bars import Bar, Group, bar_chart
from deepseek_export.report.lines import Axis, Line, Point, line_chart
from deepseek_export.report.svg import Picture
from perf import labels
from perf.peers.field import RATE
from perf.results import Case, SuiteResult
from perf.suites import mtp, sparse
from perf.suites.compile import PACKED, PEER, REFERENCE

_MIB = 1 << 20
LOWER, HIGHER = "↓ 越低越好", "↑ 越高越好"


def draw(suite: SuiteResult) -> dict[str, Picture]:
    """一套的图：文件名（不带 ``.svg``）→ 图；没有登记的套件没有。"""
    pictures = FIGURES[suite.suite](suite) if suite.suite in FIGURES else {}
    return {f"{suite.suite}-{name}" if name else suite.suite: picture for name, picture in pictures.items()}


def _grouped(
    title: str,
    cases: Sequence[Case],
    series: Mapping[str, tuple[str, int]],
    shown: Callable[[float], str],
    note: str,
) -> Picture:
    """一格一组、一个系列一条；``series`` 是结果里的键 → 名字与颜色的次序。"""
    groups = [
        Group(case.name, [_bar(name, case.values[key], shown, slot) for key, (name, slot) in series.items()])
        for case in cases
    ]
    return bar_chart(title, _spoken(groups), groups, note=note, heading=True)


def _bar(name: str, spread: Spread, shown: Callable[[float], str], slot: int) -> Bar:
    return Bar(name, spread.median, spread.low, spread.high, shown(spread.median), slot)


def _spoken(groups: Sequence[Group]) -> str:
    """给读屏软件的：把每一条念出来。"""
    lines = [(group.name, "，".join(f"{bar.name} {bar.shown}" for bar in group.bars)) for group in groups]
    return "；".join(f"{name}：{words}" if name else words for name, words in lines) + "。"


def _milliseconds(seconds: float) -> str:
    return f"{labels.number(seconds * 1e3)} ms"


def _mebibytes(count: float) -> str:
    return f"{labels.number(count / _MIB)} MiB"


def _mla_memory(suite: SuiteResult) -> dict[str, Picture]:
    titles = {"cache_resident": ("cache", "KV 缓存实测占用"), "peak": ("peak", "整个进程的峰值")}
    return {
        name: _grouped(
            title,
            suite.cases,
            {f"mla.{field}": ("mla", 1), f"baseline.{field}": ("baseline", 0)},
            _mebibytes,
            LOWER,
        )
        for field, (name, title) in titles.items()
    }


def _mla_decode(suite: SuiteResult) -> dict[str, Picture]:
    series = (("transformers", 0), ("baseline", 2), ("naive", 3), ("absorb", 1))
    return {"": _by_context("解码一步的时间与上下文", suite.cases, series)}


def _sparse(suite: SuiteResult) -> dict[str, Picture]:
    series = ((sparse.PEER, 0), (sparse.DENSE, 2), (sparse.DSA, 1), (sparse.DSA_INT8, 3), (sparse.LLAMA, 4))
    cases = [case for case in suite.cases if "context" in case.facts]
    return {
        f"b{batch}": _by_context(
            f"稀疏注意力：解码一步的时间与上下文，batch {batch}",
            [case for case in cases if case.facts["batch"] == batch],
            series,
        )
        for batch in dict.fromkeys(case.facts["batch"] for case in cases)
    }


def _by_context(title: str, cases: Sequence[Case], series: Sequence[tuple[str, int]]) -> Picture:
    """一个系列一条线，横轴是上下文；某一格没有测的系列，那里没有点，一格也没有的不画。"""
    contexts = [case.facts["context"] for case in cases]
    lines = []
    for name, slot in series:
        spreads = {
            case.facts["context"]: case.values[f"{name}.step_s"].scaled(1e3)
            for case in cases
            if f"{name}.step_s" in case.values
        }
        points = [
            Point(x, s.median, s.low, s.high, f"{labels.number(s.median)} ms") for x, s in spreads.items()
        ]
        if points:
            lines.append(Line(labels.series(name), points, slot))
    ends = "；".join(f"{line.name} 从 {line.points[0].note} 到 {line.points[-1].note}" for line in lines)
    return line_chart(
        title,
        f"上下文 {contexts[0]} 到 {contexts[-1]} 个 token：{ends}。",
        lines,
        Axis("上下文（token，对数）", logarithmic=True, ticks=contexts),
        Axis("一步（ms，对数）", logarithmic=True),
        better="越低越好",
        heading=True,
    )


def _mtp(suite: SuiteResult) -> dict[str, Picture]:
    bars = [_bar(case.name, case.ratios["time"], lambda value: f"{value:.2f}", 1) for case in suite.cases]
    times = bar_chart(
        "每个 token 的时间：投机 / 普通",
        _spoken([Group("", bars)]),
        [Group("", bars)],
        note=LOWER,
        rule=(1.0, "1：一样快"),
        heading=True,
    )
    lines, marks = [], []
    for slot, case in enumerate(suite.cases, 1):
        points = [Point.exact(*at) for at in zip(case.facts["acceptances"], case.facts["curve"], strict=True)]
        lines.append(Line(case.name, points, slot, dots=False))
        if (speculation := case.facts.get("speculation")) is not None:
            ratio = case.ratios["time"]
            at = equivalent_acceptance(speculation["tokens_per_call"], speculation["num_draft_tokens"])
            note = f"{case.name}：实测接受率 {at:.1%}，比值 {ratio.median:.2f}"
            marks.append((slot, Point(at, ratio.median, ratio.low, ratio.high, note)))
    curve = line_chart(
        "多高的接受率才划算",
        "由实测步耗算出的曲线，越过 1 的虚线才划算。" + "；".join(point.note for _, point in marks) + "。",
        lines,
        Axis("每个草稿的条件接受率"),
        Axis("投机 / 普通"),
        better="越低越好",
        rule=(1.0, "盈亏平衡"),
        marks=marks,
        marks_name="圈：实测的接受率与比值",
        heading=True,
    )
    return {"time": times, "break-even": curve}


def equivalent_acceptance(tokens_per_call: float, drafts: int) -> float:
    """各个草稿的接受率并不相同；换算成都相同时的那一个，一轮产出的 token 数与实测的一样。"""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if mtp.tokens_per_round(middle, drafts) < tokens_per_call:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _moe(suite: SuiteResult) -> dict[str, Picture]:
    shown = {"moe": ("稀疏专家", 1), "dense": ("总参数相同的稠密", 2), "off": ("每个专家都算", 0)}
    titles = {"token_s": ("decode", "解码：每个 token"), "prefill_s": ("prefill", "prefill：整批")}
    return {
        name: _grouped(
            title, suite.cases, {f"{key}.{field}": look for key, look in shown.items()}, _milliseconds, LOWER
        )
        for field, (name, title) in titles.items()
    }


def _moe_quality(suite: SuiteResult) -> dict[str, Picture]:
    facts = suite.cases[0].facts
    names = {"dense": ("稠密", 0), "no-bias": ("MoE，不更新偏置", 2), "moe": ("MoE", 1)}
    lines = [
        Line(shown, [Point.exact(*at) for at in zip(facts["steps"], facts["curves"][key], strict=True)], slot)
        for key, (shown, slot) in names.items()
    ]
    values = [point.y for line in lines for point in line.points]
    loss = line_chart(
        "激活参数相同的留出损失",
        "；".join(f"{line.name} 最后是 {line.points[-1].y:.3f}" for line in lines) + "。",
        lines,
        Axis("训练步数"),
        Axis("留出损失（每 token，自然对数）", bottom=min(values) * 0.95, top=max(values) * 1.02),
        better="越低越好",
        heading=True,
    )
    loads = []
    for key, shown, slot in (("no-bias", "不更新偏置", 2), ("moe", "更新偏置", 1)):
        layers = facts["loads"][key]
        share = sorted(load * len(layer) / sum(layer) for layer in layers for load in layer)[::-1]
        loads.append(Line(shown, [Point.exact(i + 1, y) for i, y in enumerate(share)], slot, dots=False))
    balance = line_chart(
        "专家负载",
        "；".join(f"{line.name}：最忙的是平均的 {line.points[0].y:.2f} 倍" for line in loads) + "。",
        loads,
        Axis("全部层的专家，按负载排序"),
        Axis("负载 / 平均，越近 1 越好"),
        rule=(1.0, "平均"),
        steps=True,
        heading=True,
    )
    return {"loss": loss, "load": balance}


def _compile(suite: SuiteResult) -> dict[str, Picture]:
    sizes = [case for case in suite.cases if "parameters" in case.facts]
    engines = [case for case in suite.cases if "layers" in case.facts]
    panels = {
        "export-time": (sizes, "seconds", 1.0, "秒", "导出的时间"),
        "export-memory": (sizes, "peak", 1 / _MIB, "MiB", "导出的内存峰值"),
        "engine-time": (engines, "seconds", 1.0, "秒", "建引擎的时间"),
        "engine-size": (engines, "plan_bytes", 1 / _MIB, "MiB", "plan 的大小"),
    }
    return {name: _costs(*panel) for name, panel in panels.items() if panel[0]}


def _costs(cases: Sequence[Case], field: str, factor: float, unit: str, title: str) -> Picture:
    # 引擎那几格只有 dsx 一个系列；历史里早先的导出也叫这个名字，那时只有按引用的。
    by_layers = "layers" in cases[0].facts
    series = {
        "dsx": ("dsx" if by_layers else REFERENCE, 1),
        REFERENCE: (REFERENCE, 1),
        PACKED: (PACKED, 3),
        PEER: (PEER, 2),
    }
    lines = []
    for name, (shown, slot) in series.items():
        points = []
        for case in cases:
            if (spread := case.values.get(f"{name}.{field}")) is not None:
                at = case.facts["layers"] if by_layers else case.facts["parameters"] / 1e9
                s = spread.scaled(factor)
                points.append(
                    Point(at, s.median, s.low, s.high, f"{case.name} {labels.number(s.median)} {unit}")
                )
        if points:
            lines.append(Line(labels.series(shown), points, slot))
    ticks = sorted({point.x for line in lines for point in line.points})
    return line_chart(
        title,
        "；".join(f"{line.name}：" + "，".join(point.note for point in line.points) for line in lines) + "。",
        lines,
        Axis("层数", ticks=ticks)
        if by_layers
        else Axis("参数量（十亿，对数）", logarithmic=True, ticks=ticks),
        Axis(unit),
        better="越低越好",
        heading=True,
    )


def _peers(suite: SuiteResult) -> dict[str, Picture]:
    """每格一张，各自的刻度：深处 transformers 比别的慢两个数量级。"""
    made = {}
    for case in suite.cases:
        last = case is suite.cases[-1]
        field, shown, note = (
            ("peak", _mebibytes, LOWER) if last else (RATE, labels.number, f"token / 秒，{HIGHER}")
        )
        found = {key.rpartition(".")[0]: value for key, value in case.values.items() if key.endswith(field)}
        bars = [
            _bar(name, value, shown, 1 if name.startswith("dsx") else 0)
            for name, value in sorted(found.items(), key=lambda item: item[0].startswith("dsx"))
        ]
        title = "进程的内存峰值" if last else case.name
        name = "memory" if last else case.name.replace(" ", "-")
        made[name] = bar_chart(title, _spoken([Group("", bars)]), [Group("", bars)], note=note, heading=True)
    return made


def _gpu(suite: SuiteResult) -> dict[str, Picture]:
    """每个算子一张：占上限的几成，机器码审计的估计在旁边；没有核对过的点不画。"""
    made = {}
    operators = {
        "attention": "LatentAttention",
        "experts": "MoeExperts",
        "selection": "IndexTopK",
        "sparse": "SparseLatentAttention",
        "coded-experts": "QuantizedMoeExperts",
        "coded-linear": "QuantizedLinear",
    }
    for name, operator in operators.items():
        groups = [
            Group(f"{case.name.removeprefix(operator).strip()}（{case.facts['bound']}）", _shares(case))
            for case in suite.cases
            if case.name.startswith(operator) and case.ratios and "share" in case.facts
        ]
        if groups:
            title, note = f"{operator} 占上限的几成", f"同一张卡当场测得的拷贝或方阵乘法为 1，{HIGHER}"
            made[name] = bar_chart(title, _spoken(groups), groups, note=note, heading=True)
    return made


def _shares(case: Case) -> list[Bar]:
    seconds, share, guess = case.values["dsx.seconds"], case.facts["share"], case.facts["estimated_share"]
    low, high = (share * seconds.median / one for one in (seconds.high, seconds.low))
    bars = [Bar("测得", share, low, high, f"{share:.0%}", 1)]
    return bars if guess is None else [*bars, Bar("估计至多", guess, guess, guess, f"{guess:.0%}", 0)]


#: 套件 → 怎么画；没有登记的只有表。
FIGURES: Mapping[str, Callable[[SuiteResult], dict[str, Picture]]] = MappingProxyType(
    {
        "mla-memory": _mla_memory,
        "mla-decode": _mla_decode,
        "sparse": _sparse,
        "mtp": _mtp,
        "moe": _moe,
        "moe-quality": _moe_quality,
        "compile": _compile,
        "peers": _peers,
        "peers-torch": _peers,
        "gpu": _gpu,
    }
)
