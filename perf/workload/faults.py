"""在一套 stage 上弄坏一处，看几个不停地要回答的客户各等多久，整套多久又起来。"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter, sleep
from types import MappingProxyType
from typing import Self

from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.local import LocalLauncher
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession
from deepseek_export.serving import Engine, EngineSettings
from perf.workload.faulty import FaultyEdges, Mode
from perf.workload.pipelines import open_stages, until

#: 客户被拒绝之后，隔多久再来。
_RETRY_S = 0.05
_LIMIT_S = 120.0
#: 对最后一个 stage 发的信号。
SIGNALS: Mapping[str, int] = MappingProxyType({"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP})
#: 对最后一个 stage 之前那条边动的手脚。
EDGES: Mapping[str, Mode] = MappingProxyType(
    {"信道断了": "cut", "信道不递了": "hold", "递坏了": "corrupt", "递得慢": "slow"}
)
FAULTS = (*SIGNALS, *EDGES)


@dataclass(frozen=True)
class _Wait:
    """一个请求。"""

    submitted: float
    ended: float
    failed: bool


class Faulted:
    """一套 stage 上的引擎，两个槽；出一次事，等它好，再出下一次。用完要关，可以写成 ``with``。

    Args:
        path: 一套 stage。
        clients: 几个客户；比槽多的在排队。
        new_tokens: 一个回答几个 token。
    """

    def __init__(self, path: str, clients: int, new_tokens: int) -> None:
        self._edges, self._clients, self._new_tokens = FaultyEdges(), clients, new_tokens
        launcher = LocalLauncher(StageSet.open(path).directories, threads=1, link=self._edges.link)
        self._runner = open_stages(path, ClusterSettings(), launcher)
        self._engine = Engine(ModelSession(self._runner), (), EngineSettings(slots=2))

    def close(self) -> None:
        """停下引擎与各个 stage。"""
        self._engine.close(drain=False)
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def suffer(self, name: str) -> dict[str, float]:
        """出一次 :data:`FAULTS` 里的事，直到又好了。

        Returns:
            ``longest_s``，出事时在等的、出事之后才来的客户里，等得最久的一个：从出事（或提交）到有回答，答的也可以是可以重试的错误；
            ``restart_s``，从看出断了到整套又起来，慢不算断，没有这一项。

        Raises:
            RuntimeError: 有客户一直没有回答，整套起不来，或慢了就重起了。
        """
        runner, waits, stop = self._runner, list[_Wait](), threading.Event()
        threads = [
            threading.Thread(target=self._ask, args=(waits, stop), daemon=True) for _ in range(self._clients)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(waits) >= self._clients, _LIMIT_S)
        generation, began = runner.generation, perf_counter()
        found = {}
        if name in SIGNALS:
            os.kill(runner.stages[-1]["pid"], SIGNALS[name])
        else:
            self._edges.modes[self._edges.made - 2] = EDGES[name]  # 最后造的那条回到发起的一端
        if EDGES.get(name) != "slow":
            until(lambda: runner.failure is not None, _LIMIT_S)
            broken = perf_counter()
            self._edges.modes.clear()
            until(lambda: runner.failure is None, _LIMIT_S)
            found["restart_s"] = perf_counter() - broken
        elif not self._answered(waits, began, 2 * self._clients) or runner.generation != generation:
            raise RuntimeError(f"{name}：慢了就重起了")
        self._edges.modes.clear()
        if not self._answered(waits, perf_counter(), self._clients):
            raise RuntimeError(f"{name}：又起来之后有请求失败")
        stop.set()
        for thread in threads:
            thread.join(_LIMIT_S)
        longest = max(one.ended - max(one.submitted, began) for one in waits if one.ended > began)
        return found | {"longest_s": longest}

    def _answered(self, waits: list[_Wait], since: float, count: int) -> bool:
        """等到 ``since`` 之后提交的有 ``count`` 个回答；都成功了没有。"""

        def later() -> list[_Wait]:
            return [one for one in tuple(waits) if one.submitted > since]

        until(lambda: len(later()) >= count, _LIMIT_S)
        return not any(one.failed for one in later())

    def _ask(self, waits: list[_Wait], stop: threading.Event) -> None:
        while not stop.is_set():
            submitted, failed = perf_counter(), False
            request = self._engine.submit([5, 9, 23], max_new_tokens=self._new_tokens, ignore_eos=True)
            try:
                request.result(_LIMIT_S)
            except DsxError:
                failed = True
            waits.append(_Wait(submitted, perf_counter(), failed))
            if failed:
                sleep(_RETRY_S)
