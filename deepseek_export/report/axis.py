"""数轴：值到像素，刻度放在哪里。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_export.report.svg import text_width


@dataclass(frozen=True)
class Scale:
    """一根轴。

    Attributes:
        low, high: 值的范围；对数轴两端都为正。
        start, stop: 对应的像素。
        logarithmic: 对数轴。
    """

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """``value`` 画在哪里；超出范围的钉在边上。"""
        low, high, value = (
            (math.log(v) if v > 0 else -math.inf) if self.logarithmic else v
            for v in (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.0
        return self.start + (self.stop - self.start) * min(max(share, 0.0), 1.0)


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """``low`` 到 ``high`` 之间大约 ``count`` 个整齐的刻度。"""
    if not math.isfinite(high - low) or high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * nice for nice in (1, 2, 2.5, 5, 10) if unit * nice >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def decades(low: float, high: float, count: int = 6) -> list[float]:
    """``low`` 到 ``high`` 之间的十的幂，多了就隔几个取一个，总有最大的那个。"""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / count))
    return [10.0**power for power in range(last, first - 1, -step)][::-1]


def spaced(
    ticks: Sequence[float], scale: Scale, shown: Callable[[float], str], gap: float = 8.0
) -> list[tuple[float, str]]:
    """写得下而不相撞的刻度：（像素，字）；头尾两个优先。"""
    labels = [(scale(tick), shown(tick)) for tick in ticks]
    kept = labels[:1]
    for at, words in labels[1:]:
        while len(kept) > 1 and at == labels[-1][0] and _close(kept[-1], (at, words), gap):
            kept.pop()
        if not _close(kept[-1], (at, words), gap):
            kept.append((at, words))
    return kept


def _close(one: tuple[float, str], other: tuple[float, str], gap: float) -> bool:
    return abs(other[0] - one[0]) < (text_width(one[1]) + text_width(other[1])) / 2 + gap


def short(value: float) -> str:
    """三位有效数字，不用指数，大数按千分节。"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def power(value: float) -> str:
    """对数轴上的十的幂：``1``、``10⁻³``。"""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    exponent = round(math.log10(value))
    return {0: "1", 1: "10"}.get(exponent) or "10" + str(exponent).translate(digits)
