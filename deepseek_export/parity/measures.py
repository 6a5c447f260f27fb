"""三个量一起看：最大绝对差（带坐标）、余弦型差异、范数比。

只看最大绝对差会放过方向全错的小数值，只看余弦会放过整体放大；三个量各防一类错。
出处：DeepSeek TileKernels 的 ``calc_diff``（``1 - 2<x,y>/(|x|²+|y|²)``）。
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """``got`` 相对 ``want`` 的差异。

    Attributes:
        max_abs: 最大绝对差；``got`` 里有 NaN/Inf 而 ``want`` 没有时为 inf。
        coordinate: 最大绝对差的坐标。
        calc_diff: ``1 - 2<x,y>/(|x|²+|y|²)``，0 表示相同。
        norm_ratio: ``|got| / |want|``。
        scale: ``want`` 的均方根，最大绝对差以它为尺。
        count: 元素个数。
        got, want: 最大绝对差那一处的两个值；没有元素时都是 0。
    """

    max_abs: float
    coordinate: tuple[int, ...]
    calc_diff: float
    norm_ratio: float
    scale: float
    count: int
    got: float
    want: float

    @property
    def relative(self) -> float:
        """``|got - want| / |want|``（范数），由 ``calc_diff`` 与 ``norm_ratio`` 还原。"""
        return math.sqrt(self.calc_diff * (1 + self.norm_ratio**2))


def measure(got: np.ndarray, want: np.ndarray) -> Measure:
    """比较两个同形数组；用 float64 计算。

    Raises:
        ValueError: 形状不同（dsx 的缺陷）。
    """
    if got.shape != want.shape:
        raise ValueError(f"形状不同：{got.shape} 与 {want.shape}")
    x, y = got.astype(np.float64), want.astype(np.float64)
    if x.size == 0:
        return Measure(0.0, (), 0.0, 1.0, 0.0, 0, 0.0, 0.0)
    with np.errstate(invalid="ignore"):  # inf 减 inf 是 NaN，下一行就处理
        gap = np.abs(x - y)
    gap[~np.isfinite(gap)] = np.inf
    gap[(x == y) | (np.isnan(x) & np.isnan(y))] = 0.0  # 同为 inf 或同为 NaN 不算差
    where = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    values = float(x[where]), float(y[where])
    if not np.isfinite(gap).all():
        return Measure(float("inf"), where, float("inf"), float("inf"), rms(y), x.size, *values)
    xx, yy, xy = float((x * x).sum()), float((y * y).sum()), float((x * y).sum())
    calc_diff = 0.0 if xx + yy == 0 else max(0.0, 1 - 2 * xy / (xx + yy))
    ratio = 1.0 if xx == yy else float(np.sqrt(xx / yy)) if yy else float("inf")
    return Measure(float(gap[where]), where, calc_diff, ratio, rms(y), x.size, *values)


def rms(array: np.ndarray) -> float:
    """有限元素的均方根，用 float64 计算。"""
    y = array.astype(np.float64)
    finite = y[np.isfinite(y)]
    return float(np.sqrt((finite * finite).mean())) if finite.size else 0.0
