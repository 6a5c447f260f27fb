"""折线图：一条线一个系列，带散布的带子、参考线与单独的实测点。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_export.report.axis import Scale, decades, linear_ticks, power, short, spaced
from deepseek_export.report.svg import (
    COLOURS,
    WIDTH,
    Picture,
    dot,
    legend,
    line,
    path,
    rect,
    tag,
    text,
    text_width,
)

_HEIGHT = 250.0


@dataclass(frozen=True)
class Point:
    """一个点：``y`` 是中位数，``low`` 到 ``high`` 是散布；没有散布就都等于 ``y``。"""

    x: float
    y: float
    low: float
    high: float
    note: str = ""

    @classmethod
    def exact(cls, x: float, y: float) -> Point:
        """没有散布的点。"""
        return cls(x, y, y, y)


@dataclass(frozen=True)
class Line:
    """一个系列。

    Attributes:
        name: 图例里的名字。
        points: 按 x 从小到大。
        slot: 颜色的次序。
        dots: 每个点画一个记号。
    """

    name: str
    points: Sequence[Point]
    slot: int
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """一根轴怎么写。

    Attributes:
        label: 名目与单位。
        logarithmic: 对数轴。
        ticks: 刻度；缺省自己挑。
        bottom, top: 轴从哪里到哪里；缺省线性的从 0 起，到最高的点。
    """

    label: str
    logarithmic: bool = False
    ticks: Sequence[float] = ()
    bottom: float = 0.0
    top: float | None = None


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    better: str = "",
    rule: tuple[float, str] | None = None,
    marks: Sequence[tuple[int, Point]] = (),
    marks_name: str = "",
    steps: bool = False,
    heading: bool = False,
) -> Picture:
    """一张折线图。

    Args:
        title, description: 给读屏软件的。
        lines: 系列。
        x, y: 两根轴。
        better: 例如「越低越好」。
        rule: 一条横的参考线与它的名字。
        marks: 不连线的点：颜色的次序与点，画成空心圈，纵向的须是散布。
        marks_name: 这些点在图例里的名字。
        steps: 画成台阶。
        heading: 图名也画在图里（单独成文件时）。
    """
    top = 22.0 if heading else 0.0
    head = text(0, 15, title, class_="strong", size=13.0) if heading else ""
    entries = [(dot(0, 0, one.slot) if one.dots else _swatch(one.slot), one.name) for one in lines]
    if marks:
        entries.append((_ring(0, 0, 0), marks_name))
    keys, high = legend(entries, 4, top + 10, WIDTH - 8)
    top += high + 8
    head += keys + text(0, top + 8, y.label, class_="soft")
    if better:
        head += text(WIDTH - 2, top + 8, f"↓ {better}", "end", "soft strong")
    points = [point for one in lines for point in one.points] + [point for _, point in marks]
    vertical = _vertical(points, y, top + 20, rule)
    shown = _shown(y)
    left = max(text_width(shown(tick)) for tick in _ticks(vertical, y)) + 10
    last = max(text_width(_shown(x)(tick)) for tick in (*x.ticks, max(point.x for point in points)))
    horizontal = _horizontal(points, x, left + 6, WIDTH - 2 - max(last / 2, 8.0))
    base = vertical.start
    body = [head]
    for at, words in spaced(_ticks(vertical, y), vertical, shown, -6.0):
        body.append(line(left, at, WIDTH - 6, at) + text(left - 6, at + 4, words, "end", "soft"))
    for at, words in spaced(_ticks(horizontal, x), horizontal, _shown(x)):
        body.append(line(at, base, at, base + 4) + text(at, base + 17, words, "middle", "soft"))
    if rule is not None:
        at = vertical(rule[0])
        body.append(
            line(left, at, WIDTH - 6, at, "limit") + text(left + 4, at - 5, rule[1], class_="soft halo")
        )
    body += [_series(one, horizontal, vertical, steps) for one in lines]
    for slot, point in marks:
        at = horizontal(point.x)
        whisker = tag(
            "line",
            x1=at,
            x2=at,
            y1=vertical(point.low),
            y2=vertical(point.high),
            class_=f"line s{slot % COLOURS}",
        )
        body.append(whisker + _ring(at, vertical(point.y), slot, point.note))
    body.append(text(WIDTH - 2, base + 34, x.label, "end", "soft"))
    return Picture(title, description, WIDTH, base + 42, "".join(body))


def _series(one: Line, horizontal: Scale, vertical: Scale, steps: bool) -> str:
    upper = [(horizontal(p.x), vertical(p.high)) for p in one.points]
    lower = [(horizontal(p.x), vertical(p.low)) for p in one.points]
    middle = [(horizontal(p.x), vertical(p.y)) for p in one.points]
    if steps:
        middle = [(x, y) for (_, y), (x, _) in zip([middle[0], *middle], middle, strict=False)]
        middle = [
            at
            for pair in zip(middle, [(horizontal(p.x), vertical(p.y)) for p in one.points], strict=True)
            for at in pair
        ]
    slot = one.slot % COLOURS
    made = ""
    if any(p.low < p.high for p in one.points):
        made += path([*upper, *lower[::-1]], f"band f{slot}", closed=True)
    made += path(middle, f"line s{slot}")
    if one.dots:
        made += "".join(
            dot(x, y, slot, note=f"{one.name}：{p.note or short(p.y)}")
            for (x, y), p in zip(middle, one.points, strict=True)
        )
    return made


def _ring(x: float, y: float, slot: int, note: str = "") -> str:
    inside = tag("title", note) if note else ""
    return tag("circle", inside, cx=float(x), cy=float(y), r=5.0, class_=f"hollow line s{slot % COLOURS}")


def _swatch(slot: int) -> str:
    return rect(-7, -2, 14, 4, f"f{slot % COLOURS}")


def _vertical(points: Sequence[Point], axis: Axis, top: float, rule: tuple[float, str] | None) -> Scale:
    highest = axis.top or max([point.high for point in points] + ([rule[0]] if rule else []))
    if axis.logarithmic:
        low, high = min(point.low for point in points), highest
        return Scale(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), top + _HEIGHT, top, True
        )
    return Scale(axis.bottom, highest * (1.0 if axis.top else 1.05) or 1.0, top + _HEIGHT, top)


def _horizontal(points: Sequence[Point], axis: Axis, left: float, right: float) -> Scale:
    low, high = min(point.x for point in points), max(point.x for point in points)
    if low == high:  # 只有一个点：放在中间
        low, high = (low / 2, high * 2) if axis.logarithmic and low > 0 else (low - 1, high + 1)
    return Scale(low, high, left, right, axis.logarithmic)


def _ticks(scale: Scale, axis: Axis) -> Sequence[float]:
    if axis.ticks:
        return axis.ticks
    return (decades if scale.logarithmic else linear_ticks)(scale.low, scale.high)


def _shown(axis: Axis) -> Callable[[float], str]:
    return power if axis.logarithmic and not axis.ticks else _plain


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
