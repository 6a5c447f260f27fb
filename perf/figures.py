"""报告里的图：每套一张，中文标注，一份 SVG 同时适用亮色与暗色。"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import matplotlib

matplotlib.use("svg")

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from deepseek_export.benchmark.spread import Spread
from perf import labels
from perf.results import SuiteResult
from perf.suites import peers
from perf.suites.compile import PACKED, PEER, REFERENCE

#: 依次找，用第一个装了的。
FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
)
#: ``normal`` 的字重。
_NORMAL = 400
#: 画图时用的两个占位颜色，写出 SVG 之后换成 CSS 变量，或某一种主题的真颜色。
_INK, _GRID = "#010203", "#040506"
THEMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "light": {_INK: "#1f2328", _GRID: "#d1d9e0"},
        "dark": {_INK: "#e6edf3", _GRID: "#3d444d"},
    }
)
VARIABLES: Mapping[str, str] = MappingProxyType({_INK: "var(--ink)", _GRID: "var(--grid)"})
#: 在白底与深底上都看得清的颜色，次序固定。
PALETTE = ("#8b949e", "#2f81f7", "#e3742f", "#3fa266", "#a371f7", "#d4a72c", "#cf5b88")
_MIB = 1 << 20


class NoChineseFont(Exception):
    """系统里没有能显示汉字的字体。"""


def chinese_font() -> str:
    """:data:`FONTS` 里装了的第一个。

    Raises:
        NoChineseFont: 一个也没有。
    """
    fonts = font_manager.fontManager.ttflist
    installed = {entry.name: entry for entry in fonts}
    for name in FONTS:
        if name in installed:
            # 文泉驿只有一种字重，自称 500；不按 normal 登记一份，matplotlib 每张图都警告一次找不到。
            if _NORMAL not in {entry.weight for entry in fonts if entry.name == name}:
                fonts.append(replace(installed[name], weight=_NORMAL))
            return name
    raise NoChineseFont(
        "没有中文字体，图没有画。apt-get install fonts-wqy-zenhei（或 fonts-noto-cjk），再 python -m perf report"
    )


def draw(suite: SuiteResult) -> str:
    """一套的图，SVG 文本，颜色是占位的；汉字已转成路径，看的人不需要字体。

    Raises:
        NoChineseFont: 画不了汉字。
    """
    style: Any = {
        "font.family": [chinese_font(), "DejaVu Sans"],  # 汉字字体缺的符号由后者补
        "axes.unicode_minus": False,
        "svg.fonttype": "path",
        "svg.hashsalt": suite.suite,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "axes.titlesize": 11,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 4), layout="constrained")
        FIGURES[suite.suite](figure, suite)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    # 同一页里放几张，id 不能相同。
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{suite.suite}-", text)


def coloured(svg: str, colours: Mapping[str, str]) -> str:
    """把占位颜色换掉。"""
    for placeholder, colour in colours.items():
        svg = svg.replace(placeholder, colour)
    return svg


def write_themes(suite: SuiteResult, folder: Path) -> list[Path]:
    """``NAME-light.svg`` 与 ``NAME-dark.svg``。"""
    svg, paths = draw(suite), []
    for theme, colours in THEMES.items():
        path = folder / f"{suite.suite}-{theme}.svg"
        path.write_text(coloured(svg, colours) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _bars(axes: Axes, groups: list[str], series: Mapping[str, list[Spread]], label: str) -> None:
    """分组柱：高度是中位数，误差线是范围，柱顶写数。"""
    width = 0.8 / len(series)
    for index, (name, spreads) in enumerate(series.items()):
        at = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        bars = axes.bar(
            at, medians, width * 0.92, yerr=errors, label=name, color=PALETTE[index], ecolor=_INK, capsize=2
        )
        axes.bar_label(bars, fmt=_short, fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.margins(y=0.3)  # 图例横排在柱子上方
    axes.legend(loc="upper left", ncols=len(series))


def _series(suite: SuiteResult, keys: Mapping[str, str], factor: float) -> dict[str, list[Spread]]:
    """显示名 → 各格的值。"""
    return {shown: [case.values[key].scaled(factor) for case in suite.cases] for shown, key in keys.items()}


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """对数轴；刻度写成普通的数：指数里的减号，汉字字体没有。"""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _mla_memory(figure: Figure, suite: SuiteResult) -> None:
    names = [case.name.replace(" ", "\n") for case in suite.cases]
    left, right = figure.subplots(1, 2)
    cache = {"baseline": "baseline.cache_resident", "mla": "mla.cache_resident"}
    _bars(left, names, _series(suite, cache, 1 / _MIB), "MiB（对数）")
    _logarithmic(left, "y")
    left.set_title("KV 缓存实测占用")
    _bars(right, names, _series(suite, {"baseline": "baseline.peak", "mla": "mla.peak"}, 1 / _MIB), "MiB")
    right.set_title("整个进程的峰值")


def _mla_decode(figure: Figure, suite: SuiteResult) -> None:
    axes = figure.subplots()
    contexts = [case.facts["context"] for case in suite.cases]
    for index, name in enumerate(("transformers", "baseline", "naive", "absorb")):
        spreads = [case.values[f"{name}.step_s"].scaled(1e3) for case in suite.cases]
        axes.plot(contexts, [s.median for s in spreads], marker="o", label=name, color=PALETTE[index])
        axes.fill_between(
            contexts, [s.low for s in spreads], [s.high for s in spreads], color=PALETTE[index], alpha=0.2
        )
    axes.set_xscale("log", base=2)
    _logarithmic(axes, "y")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("上下文（token）")
    axes.set_ylabel("解码一步（ms，对数）")
    axes.set_title("解码一步的时间")
    axes.legend()


def _mtp(figure: Figure, suite: SuiteResult) -> None:
    left, right = figure.subplots(1, 2)
    keys = {"普通": "plain.token_s", "投机": "speculative.token_s"}
    _bars(left, [case.name for case in suite.cases], _series(suite, keys, 1e3), "ms（对数）")
    _logarithmic(left, "y")
    left.set_title("解码：每个 token 的时间")
    for index, case in enumerate(suite.cases):
        colour = PALETTE[1 + index % (len(PALETTE) - 1)]
        right.plot(case.facts["acceptances"], case.facts["curve"], label=case.name, color=colour)
    right.axhline(1, color=_INK, linewidth=1, linestyle="--")
    right.annotate("盈亏平衡", (0, 1), xytext=(3, 3), textcoords="offset points", fontsize=8)
    right.set_xlabel("每个草稿的条件接受率")
    right.set_ylabel("投机 / 普通（由实测步耗算出）")
    right.set_title("多高的接受率才划算")
    right.legend()


def _moe(figure: Figure, suite: SuiteResult) -> None:
    panels = figure.subplots(1, 2)
    shown = {"off": "每个专家都算", "dense": "总参数相同的稠密", "moe": "稀疏专家"}
    titles = {"token_s": "解码：每个 token", "prefill_s": "prefill：整批"}
    for axes, (field, title) in zip(panels, titles.items(), strict=True):
        keys = {label: f"{name}.{field}" for name, label in shown.items()}
        _bars(axes, [case.name for case in suite.cases], _series(suite, keys, 1e3), "ms")
        axes.set_title(title)
        axes.get_legend().remove()  # 名字长，放不进一栏
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))


def _moe_quality(figure: Figure, suite: SuiteResult) -> None:
    left, right = figure.subplots(1, 2)
    facts = suite.cases[0].facts
    names = {"dense": "稠密", "no-bias": "MoE，不更新偏置", "moe": "MoE"}
    for index, (name, label) in enumerate(names.items()):
        left.plot(facts["steps"], facts["curves"][name], marker="o", label=label, color=PALETTE[index])
    left.set_xlabel("训练步数")
    left.set_ylabel("留出损失（每 token，自然对数）")
    left.set_title("激活参数相同")
    left.legend()
    for index, (name, label) in enumerate((("no-bias", "不更新偏置"), ("moe", "更新偏置"))):
        layers = facts["loads"][name]
        share = sorted(load * len(layer) / sum(layer) for layer in layers for load in layer)[::-1]
        right.step(range(len(share)), share, where="mid", label=label, color=PALETTE[1 + index])
    right.axhline(1, color=_INK, linewidth=1, linestyle="--")
    right.set_xlabel("全部层的专家，按负载排序")
    right.set_ylabel("负载 / 平均")
    right.set_title("专家负载")
    right.legend()


def _compile(figure: Figure, suite: SuiteResult) -> None:
    sizes = [case for case in suite.cases if "parameters" in case.facts]
    engines = [case for case in suite.cases if "layers" in case.facts]
    panels = [
        (sizes, "seconds", 1.0, "秒", "导出的时间"),
        (sizes, "peak", 1 / _MIB, "MiB", "导出的内存峰值"),
        (engines, "seconds", 1.0, "秒", "建引擎的时间"),
        (engines, "plan_bytes", 1 / _MIB, "MiB", "plan 的大小"),
    ]
    # 引擎那几格只有 dsx 一个系列；历史里早先的导出也叫这个名字，那时只有按引用的。
    series = {"dsx": REFERENCE, REFERENCE: REFERENCE, PACKED: PACKED, PEER: PEER}
    colours = {REFERENCE: PALETTE[1], PACKED: PALETTE[3], PEER: PALETTE[2]}
    shown = panels if engines else panels[:2]
    figure.set_figheight(4 * len(shown) // 2)
    grid = figure.subplots(len(shown) // 2, 2, squeeze=False).ravel()
    for axes, (cases, field, factor, label, title) in zip(grid, shown, strict=True):
        for name, shown_as in series.items():
            with_it = [case for case in cases if f"{name}.{field}" in case.values]
            if with_it:
                at = [case.facts.get("layers") or case.facts["parameters"] / 1e9 for case in with_it]
                medians = [case.values[f"{name}.{field}"].median * factor for case in with_it]
                axes.plot(at, medians, marker="o", label=labels.series(shown_as), color=colours[shown_as])
        if cases is sizes:
            _logarithmic(axes, "x")
        axes.set_xlabel("参数量（十亿，对数）" if cases is sizes else "层数")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        if axes is grid[0]:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(colours))


def _peers(figure: Figure, suite: SuiteResult) -> None:
    """每格一栏横条，各自的刻度：深处 transformers 比别的慢两个数量级，画在一起只能用对数轴，看不出差别。"""
    memory = suite.cases[-1]
    names = [name for name in reversed(peers.SERIES) if f"{name}.peak" in memory.values]
    panels = figure.subplots(1, len(suite.cases), sharey=True)
    for axes, case in zip(panels, suite.cases, strict=True):
        field, factor = ("peak", 1 / _MIB) if case is memory else (peers.RATE, 1.0)
        spreads = [case.values[f"{name}.{field}"].scaled(factor) for name in names]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        colours = [PALETTE[peers.SERIES.index(name)] for name in names]
        bars = axes.barh(names, medians, xerr=errors, color=colours, ecolor=_INK, capsize=2)
        axes.bar_label(bars, fmt=_short, fontsize=8, padding=3)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.margins(x=0.35)
        axes.set_title(case.name)
        axes.set_xlabel("MiB，峰值" if case is memory else "token / 秒")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


#: 套件 → 怎么画；没有登记的只有表。
FIGURES: Mapping[str, Callable[[Figure, Any], None]] = MappingProxyType(
    {
        "mla-memory": _mla_memory,
        "mla-decode": _mla_decode,
        "mtp": _mtp,
        "moe": _moe,
        "moe-quality": _moe_quality,
        "compile": _compile,
        "peers": _peers,
    }
)
