"""重复测量：交替地跑、逐对地比，报告中位数与散布。"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Spread(BaseModel):
    """同一个量的几次测量。

    Attributes:
        median: 中位数。
        low, high: 最小与最大，量的分辨力更粗时放宽到它；「散布」就是这个区间。
        samples: 每一次的值，按测量的先后。
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """汇总；至少要有一个样本。"""
        values = tuple(float(value) for value in samples)
        return cls(median=statistics.median(values), low=min(values), high=max(values), samples=values)

    def scaled(self, factor: float) -> Spread:
        """每个样本与范围乘 ``factor``（为正）。"""
        return Spread(
            median=self.median * factor,
            low=self.low * factor,
            high=self.high * factor,
            samples=tuple(value * factor for value in self.samples),
        )

    def at_least(self, share: float) -> Spread:
        """范围不窄于中位数的 ±``share``：两三个样本碰巧一样，不等于量得那么准。"""
        low, high = self.median * (1 - share), self.median * (1 + share)
        return self.model_copy(update={"low": min(self.low, low), "high": max(self.high, high)})

    def overlaps(self, other: Spread) -> bool:
        """两个范围有没有公共的点。"""
        return self.low <= other.high and other.low <= self.high


def paired_ratio(numerator: Spread, denominator: Spread) -> Spread:
    """逐对相除：第 i 对是同一轮里挨着跑的，机器变快变慢时两边一起变。

    Raises:
        ValueError: 两边的次数不同（调用方的缺陷）。
    """
    pairs = zip(numerator.samples, denominator.samples, strict=True)
    return Spread.of([top / bottom for top, bottom in pairs])


def interleaved(contenders: Mapping[str, Callable[[], T]], runs: int, warmup: int = 1) -> dict[str, list[T]]:
    """几个对手交替各跑 ``runs`` 遍。

    每两轮换一个先跑的，第二轮倒着走：谁也不总占先手，也不总跟在同一个对手后面（前一个的线程还在自旋、缓存换成了它的）；预热的结果丢掉。

    Args:
        contenders: 名字到「跑一遍并返回测得的东西」。
        runs: 每个对手记录几遍。
        warmup: 之前先空跑几轮。
    """
    names = list(contenders)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-warmup, runs):
        turn, backwards = divmod(number, 2)
        shift = turn % len(names)
        order = names[shift:] + names[:shift]
        for name in reversed(order) if backwards else order:
            measured = contenders[name]()
            if number >= 0:
                results[name].append(measured)
    return results
