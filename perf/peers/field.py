"""几个引擎轮流上场：谁走不下去谁退场，一格里的样本怎样汇总成速度、时间之比与内存之比。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from perf.isolate import Answering
from perf.results import Case

RATE = "tokens_per_second"
#: 问一句话最多等几秒：最慢的是把 llama.cpp 的缓存填到 8192 个 token。
WITHIN = 900.0
_NOTHING: Mapping[str, Callable[[], float]] = MappingProxyType({})


class Pair(NamedTuple):
    """要比的一对：比值的名字，分子与分母是哪个引擎。"""

    name: str
    ours: str
    peer: str


@dataclass
class Field:
    """在场的引擎；走不下去的同类退场，原话留着，dsx 自己的走不下去就是错。

    Attributes:
        engines: 名字 → 进程。
        failed: 退场的 → 原话。
    """

    engines: dict[str, Answering] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def open(self, openers: Mapping[str, Callable[[], Answering]], stack: ExitStack) -> None:
        """逐个打开；``stack`` 结束时关掉。"""
        for name, opener in openers.items():
            try:
                self.engines[name] = opener()
            except RuntimeError as error:
                self._drop(name, "打开", error)
            else:
                stack.callback(self.engines[name].close)

    def each(self, names: Iterable[str], method: str, **arguments: Any) -> dict[str, Any]:
        """逐个问同一句话，得到还在场的答案。"""
        found = {}
        for name in [name for name in names if name in self.engines]:
            try:
                found[name] = self.engines[name].ask(method, within=WITHIN, **arguments)
            except RuntimeError as error:
                self._drop(name, method, error)
        return found

    def samples(
        self,
        names: Iterable[str],
        runs: int,
        method: str,
        beside: Mapping[str, Callable[[], float]] = _NOTHING,
        **arguments: Any,
    ) -> dict[str, list[float]]:
        """先各走一遍预热，再轮流各测 ``runs`` 个样本；``beside`` 是一起轮流的别的测量。"""
        ready = self.each(names, method, **arguments)
        asked = {name: partial(self.engines[name].ask, method, within=WITHIN, **arguments) for name in ready}
        contenders = asked | dict(beside)
        return interleaved(contenders, runs, warmup=0) if contenders else {}

    def memory(self, names: Iterable[str], pairs: Iterable[Pair]) -> Case:
        """``names`` 里在场的各进程现在与最多占多少；做的事要相同，映射的权重用到才算。"""
        found = {name: self.engines[name].memory() for name in names if name in self.engines}
        resident = {name: Spread.of([one.resident]) for name, one in found.items()}
        return Case(
            name="内存",
            values={f"{name}.resident": spread for name, spread in resident.items()}
            | {f"{name}.peak": Spread.of([one.peak]) for name, one in found.items()},
            ratios={
                f"内存 {pair.name}/{pair.peer}": paired_ratio(resident[pair.ours], resident[pair.peer])
                for pair in pairs
                if {pair.ours, pair.peer} <= set(resident)
            },
        )

    def _drop(self, name: str, method: str, error: RuntimeError) -> None:
        if name.startswith("dsx"):
            raise error
        self.failed[name] = f"{method}：{error}"
        if (engine := self.engines.pop(name, None)) is not None:
            engine.close()


def speeds(name: str, samples: Mapping[str, list[float]], pairs: Iterable[Pair], **facts: Any) -> Case:
    """``samples`` 是每个 token 的秒数；报每秒几个 token，比值仍是时间之比。"""
    seconds = {engine: Spread.of(found) for engine, found in samples.items()}
    return Case(
        name=name,
        values={
            f"{engine}.{RATE}": Spread.of([1 / sample for sample in found.samples])
            for engine, found in seconds.items()
        },
        ratios={
            f"{pair.name}/{pair.peer}": paired_ratio(seconds[pair.ours], seconds[pair.peer])
            for pair in pairs
            if {pair.ours, pair.peer} <= set(seconds)
        },
        facts=facts,
    )
