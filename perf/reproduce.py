"""第二次运行重不重现第一次：同一种机器、同样的场景，每个比值的散布相交。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_export.benchmark.spread import Spread
from perf.results import Run, comparable


@dataclass(frozen=True)
class Comparison:
    """一套的最后两次完整运行。

    Attributes:
        runs: 从旧到新；没有两次可比的就是空的。
        ratios: 格子、比值、旧的散布、新的散布；有一次没有那一格就是 ``None``。
    """

    suite: str
    runs: tuple[Run, ...]
    ratios: list[tuple[str, str, Spread | None, Spread | None]]

    @property
    def reproduced(self) -> bool:
        """有两次，而且每个比值都相交。"""
        return bool(self.runs) and all(_same(old, new) for _, _, old, new in self.ratios)

    def lines(self) -> list[str]:
        """给人看：一行是哪两次，再一行一个比值。"""
        if not self.runs:
            return [f"{self.suite}：没有两次可比的完整运行（同一种机器、同样的场景）"]
        named = "、".join(f"{run.started} {run.environment['git']}" for run in self.runs)
        return [
            f"{self.suite}：{named}",
            *(
                f"  {'相交' if _same(old, new) else '不相交'}  {case} · {ratio}：{_shown(old)}、{_shown(new)}"
                for case, ratio, old, new in self.ratios
            ),
        ]


def compare(suites: Iterable[str], history: list[Run]) -> list[Comparison]:
    """每一套一份；缩小的场景不算。"""
    return [_compare(suite, [run for run in history if not run.quick]) for suite in suites]


def _compare(name: str, history: list[Run]) -> Comparison:
    found = [(at, suite) for at, run in enumerate(history) for suite in run.suites if suite.suite == name]
    if not found:
        return Comparison(name, (), [])
    at, new = found[-1]
    before = comparable(history[at], new, history[:at])
    if before is None:
        return Comparison(name, (), [])
    run, old = before
    sides = [
        {(case.name, key): value for case in suite.cases for key, value in case.ratios.items()}
        for suite in (old, new)
    ]
    keys = dict.fromkeys([*sides[0], *sides[1]])
    return Comparison(
        name, (run, history[at]), [(*key, sides[0].get(key), sides[1].get(key)) for key in keys]
    )


def _same(old: Spread | None, new: Spread | None) -> bool:
    return old is not None and new is not None and old.overlaps(new)


def _shown(spread: Spread | None) -> str:
    return "没有" if spread is None else f"{spread.median:.4g}（{spread.low:.4g}–{spread.high:.4g}）"
