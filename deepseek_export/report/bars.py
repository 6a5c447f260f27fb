"""横条：一组里一条一个系列，条尾写数；刻度总从 0 起、是线性的，条的长短就是值之比。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_export.report.svg import (
    COLOURS,
    WIDTH,
    Anchor,
    Picture,
    legend,
    line,
    path,
    rect,
    shortened,
    text,
    text_width,
)

_ROW, _THICK = 20.0, 13.0


@dataclass(frozen=True)
class Bar:
    """一条。

    Attributes:
        name: 左边的名字。
        value, low, high: 中位数与散布；没有散布就都相同。
        shown: 条尾写的。
        slot: 颜色的次序。
    """

    name: str
    value: float
    low: float
    high: float
    shown: str
    slot: int


@dataclass(frozen=True)
class Group:
    """一组横条；没有名字就不写组名。"""

    name: str
    bars: Sequence[Bar]


def bar_chart(
    title: str,
    description: str,
    groups: Sequence[Group],
    *,
    note: str = "",
    rule: tuple[float, str] | None = None,
    heading: bool = False,
) -> Picture:
    """横条图。

    Args:
        title, description: 给读屏软件的。
        groups: 自上而下。
        note: 单位，与「越低越好」之类的话，写在上面。
        rule: 一条竖的参考线与它的名字。
        heading: 图名也画在图里（单独成文件时）。
    """
    bars = [bar for group in groups for bar in group.bars]
    names = max(text_width(bar.name) for bar in bars)
    above = names > WIDTH * 0.4  # 左边放不下的名字写在条的上面，不省略
    left = 2.0 if above else names + 10
    right = WIDTH - max(text_width(bar.shown) for bar in bars) - 10
    top = max([bar.high for bar in bars] + ([rule[0]] if rule else [])) or 1.0
    made, y = _head(title, note, heading)
    began, texts = y, list[str]()
    for group in groups:
        if group.name:
            made.append(text(0, y + 14, group.name, class_="strong"))
            y += _ROW
        first = y
        for bar in group.bars:
            if above:
                made.append(text(left, y + 14, shortened(bar.name, WIDTH - left)))
                y += _ROW - 2
            length, middle = (right - left) * bar.value / top, y + _ROW / 2
            if not above:
                made.append(text(left - 8, middle + 4, bar.name, "end"))
            whole = f"{bar.name}：{bar.shown}"
            made.append(rect(left, middle - _THICK / 2, length, _THICK, f"f{bar.slot % COLOURS}", whole))
            low, high = (left + (right - left) * value / top for value in (bar.low, bar.high))
            if high - low >= 1:
                made.append(line(low, middle, high, middle, "ink"))
                made += [line(at, middle - 3, at, middle + 3, "ink") for at in (low, high)]
            texts.append(text(max(high, left + length) + 6, middle + 4, bar.shown, class_="halo"))
            y += _ROW
        made.append(line(left, first, left, y, "grid"))
        y += 6
    if rule is not None:
        at = left + (right - left) * rule[0] / top
        made.append(line(at, began, at, y, "limit"))
        anchor: Anchor = "middle" if at + text_width(rule[1]) / 2 < WIDTH else "end"
        made.append(text(at if anchor == "middle" else WIDTH, y + 12, rule[1], anchor, "soft"))
        y += 18
    return Picture(title, description, WIDTH, y, "".join(made + texts))


@dataclass(frozen=True)
class Stack:
    """一条叠起来的横条。

    Attributes:
        name: 左边的名字；与前一条不同的 ``group`` 先写一行组名。
        parts: 每一段的值，次序同图例。
        shown: 下面一行写的。
        limit: 竖的界线画在哪里；没有就不画。
        fits: 没有越过界线。
        group: 组名。
    """

    name: str
    parts: Sequence[float]
    shown: str
    limit: float | None = None
    fits: bool = True
    group: str = ""


def stack_chart(
    title: str,
    description: str,
    stacks: Sequence[Stack],
    parts: Sequence[str],
    *,
    note: str = "",
    limit_name: str = "",
    slots: Sequence[int] = (),
) -> Picture:
    """叠起来的横条图；同一组共用一把尺。

    超出界线太多的条在右边截断，画一个断口：要看的是放不放得下，不是差多少倍；真的数写在条的下面。

    Args:
        title, description: 给读屏软件的。
        stacks: 自上而下。
        parts: 各段的名字。
        note: 单位之类的话，写在上面。
        limit_name: 界线在图例里的名字。
        slots: 各段的颜色，缺省从 1 起。
    """
    slots = slots or range(1, len(parts) + 1)
    made, y = _head(title, note, False)
    entries = [
        (rect(-6, -6, 12, 12, f"f{slot % COLOURS}"), name) for slot, name in zip(slots, parts, strict=True)
    ]
    if limit_name:
        entries.append((line(0, -8, 0, 8, "limit"), limit_name))
    keys, high = legend(entries, 4, y + 8, WIDTH - 8)
    made.append(keys)
    y += high + 6
    names = min(max(text_width(stack.name) for stack in stacks), WIDTH * 0.4)
    left, right = names + 10, WIDTH - 8
    group = ""
    for stack in stacks:
        if stack.group != group:
            group = stack.group
            made.append(text(0, y + 14, shortened(group, WIDTH, 12.0), class_="strong"))
            y += _ROW + 2
        same = [one for one in stacks if one.group == group]
        top = _top(same)
        middle, at = y + 8, left
        made.append(text(left - 8, middle + 4, shortened(stack.name, names), "end"))
        for slot, name, value in zip(slots, parts, stack.parts, strict=True):
            end = min(at + (right - left) * value / top, right)
            made.append(
                rect(
                    at, middle - 7, end - at, 14, f"f{slot % COLOURS}", f"{stack.name}，{name}：{stack.shown}"
                )
            )
            at = end
        if sum(stack.parts) > top * (1 + 1e-9):
            made += [path([(right - 9 + d, middle + 9), (right - 3 + d, middle - 9)], "ink") for d in (0, 4)]
        if stack.limit is not None:
            where = left + (right - left) * min(stack.limit / top, 1.0)
            made.append(line(where, middle - 10, where, middle + 10, "limit"))
        made.append(text(left, middle + 22, stack.shown, class_="soft" if stack.fits else "bad"))
        y += 38
    return Picture(title, description, WIDTH, y + 2, "".join(made))


def _top(stacks: Sequence[Stack]) -> float:
    limits = [stack.limit for stack in stacks if stack.limit is not None]
    largest = max(sum(stack.parts) for stack in stacks)
    return (
        min(largest, max(limits) * 1.3) if limits and largest > max(limits) else max([largest, *limits])
    ) or 1.0


def _head(title: str, note: str, heading: bool) -> tuple[list[str], float]:
    made, y = [], 0.0
    if heading:
        made.append(text(0, 15, title, class_="strong", size=13.0))
        y += 22
    if note:
        made.append(text(0, y + 12, note, class_="soft"))
        y += 20
    return made, y + 2
