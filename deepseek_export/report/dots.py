"""误差图：一行一个块，横轴是误差占容差的几分之几（对数），竖线就是容差。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_export.report.axis import Scale, decades, power, spaced
from deepseek_export.report.svg import (
    WIDTH,
    Picture,
    dot,
    legend,
    line,
    rect,
    shortened,
    tag,
    text,
    text_width,
)

_ROW = 18.0
#: 再小的都钉在左边：离容差已有十个数量级。
_FLOOR = 1e-10


@dataclass(frozen=True)
class Row:
    """一行。

    Attributes:
        name: 块的名字。
        shares: 各个量占容差的几分之几；没有量的是 ``None``，恰好相等的是 0。
        passed: 全部通过。
        note: 右边写的，例如近平局几行。
    """

    name: str
    shares: Sequence[float | None]
    passed: bool
    note: str = ""


def share_chart(title: str, description: str, rows: Sequence[Row], measures: Sequence[str]) -> Picture:
    """一张误差图。

    Args:
        title, description: 给读屏软件的。
        rows: 自上而下。
        measures: 各个量的名字，次序同 ``shares``。
    """
    keys, high = legend(
        [(dot(0, 0, slot + 1, slot), name) for slot, name in enumerate(measures)]
        + [(line(0, -8, 0, 8, "limit"), "容差")],
        4,
        10,
        WIDTH - 8,
    )
    made = [keys, text(0, high + 16, "误差 / 容差（对数）", class_="soft")]
    made.append(text(WIDTH - 2, high + 16, "← 越靠左越好", "end", "soft strong"))
    top = high + 28
    names = min(max(text_width(row.name) for row in rows), WIDTH * 0.42)
    notes = max((text_width(row.note) + 8 if row.note else 0.0) for row in rows)
    found = [share for row in rows for share in row.shares if share and math.isfinite(share)]
    low = 10.0 ** math.floor(math.log10(max(min([*found, 0.1]), _FLOOR)))
    highest = 10.0 ** math.ceil(math.log10(max([*found, 10.0])) + 1e-9)
    scale = Scale(low, highest, names + 22, WIDTH - notes - 14, True)
    base = top + _ROW * len(rows)
    for at, words in spaced(decades(low, highest), scale, power):
        made.append(line(at, top, at, base + 4) + text(at, base + 17, words, "middle", "soft"))
    for index, row in enumerate(rows):
        made.append(_row(row, measures, scale, top + _ROW * (index + 0.5), names))
    made.append(line(scale(1.0), top - 4, scale(1.0), base + 4, "limit"))
    return Picture(title, description, WIDTH, base + 24, "".join(made))


def _row(row: Row, measures: Sequence[str], scale: Scale, y: float, names: float) -> str:
    made = ""
    if not row.passed:
        made += rect(0, y - _ROW / 2 + 1, WIDTH, _ROW - 2, "box wrong", radius=3.0)
    made += text(names + 4, y + 4, shortened(row.name, names), "end", None if row.passed else "bad strong")
    shown = [share for share in row.shares if share is not None]
    if shown:
        made += line(scale.start, y, scale(max(shown)), y)
    for slot, (name, share) in enumerate(zip(measures, row.shares, strict=True)):
        if share is None:
            continue
        words = f"{row.name}，{name}：{percent(share)}"
        at = scale.start - 5 if share == 0 else scale(share)  # 恰好相等的在轴的左边，对数轴上没有 0
        made += dot(at, y, slot + 1, slot, note=words)
    if row.note:
        made += text(WIDTH - 2, y + 4, row.note, "end", "soft" if row.passed else "bad")
    return tag("g", made)


def percent(share: float) -> str:
    """占容差的几分之几，写给人看。"""
    if share == 0:
        return "恰好相等"
    if not math.isfinite(share):
        return "无穷大"
    return f"容差的 {share * 100:.3g} %" if share < 10 else f"容差的 {share:.3g} 倍"
