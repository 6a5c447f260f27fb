"""被比的两样，各住在自己的进程里（:class:`~perf.isolate.Worker`）：一个进程，或一套 stage；进程钉在核上，反复走同一步。"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep

import numpy as np

import deepseek_export
from deepseek_export.backend import backend_named
from deepseek_export.benchmark.depth import fill_caches
from deepseek_export.bundle import BundleWeights
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.gang import Launcher
from deepseek_export.cluster.runner import PipelineRunner
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.runtime import ModelSession

_RESTART_S = 600.0


class Stepper:
    """每行已有 ``context - 1`` 个 token，再来一个，反复走这一步。

    Args:
        session: 主模型。
        rows, context: 行数；走完这一步时每行的长度。
        parts: 各行依次分成几次调用。
    """

    def __init__(self, session: ModelSession, rows: int, context: int, parts: int = 1) -> None:
        self._session = session
        self._caches = session.new_caches(rows, context)
        fill_caches(self._caches, context - 1, seed=0)
        self._ids = np.zeros((rows, 1), np.int64)
        self._past = np.full(rows, context - 1, np.int64)
        split = np.array_split(np.arange(rows), parts)
        self._views = [(part, self._caches.rows(int(part[0]), len(part))) for part in split]

    def step(self, count: int) -> float:
        """走 ``count`` 步，返回一步的秒数，中位数。"""
        return median(self._step() for _ in range(count))

    def _step(self) -> float:
        began = perf_counter()
        for part, view in self._views:
            self._session.run(self._ids[part], self._past[part], self._ids[part], view)
        return perf_counter() - began


class Alone(Stepper):
    """一个进程，线程在 ``cores`` 这几个核上；分成小批的，一个接一个地跑。"""

    def __init__(
        self, path: str, threads: int, cores: Sequence[int], rows: int = 1, context: int = 64, parts: int = 1
    ) -> None:
        os.sched_setaffinity(0, cores)  # 加载之前：线程池的线程跟着它
        super().__init__(deepseek_export.load(path, threads).session, rows, context, parts)


class Pipeline(Stepper):
    """一套 stage，每个一个线程，第 i 个钉在第 ``i % len(cores)`` 个核上；小批依次送进去。"""

    def __init__(
        self, path: str, cores: Sequence[int], rows: int = 1, context: int = 64, parts: int = 1
    ) -> None:
        self._runner = open_stages(path, ClusterSettings(micro_batches=parts))
        for number, stage in enumerate(self._runner.stages):
            for task in Path(f"/proc/{stage['pid']}/task").iterdir():
                os.sched_setaffinity(int(task.name), {cores[number % len(cores)]})
        super().__init__(ModelSession(self._runner), rows, context)

    def restart(self) -> float:
        """杀掉最后一个 stage，返回整套又起来用了几秒。

        Raises:
            RuntimeError: 起不来。
        """
        runner, began = self._runner, perf_counter()
        generation = runner.generation
        os.kill(runner.stages[-1]["pid"], signal.SIGKILL)
        until(lambda: runner.generation > generation and runner.failure is None, _RESTART_S)
        return perf_counter() - began


def open_stages(path: str, settings: ClusterSettings, launcher: Launcher | None = None) -> PipelineRunner:
    """起一套 stage，每个一个线程；``launcher`` 见 :class:`~deepseek_export.cluster.backend.PipelineBackend`。"""
    stages = StageSet.open(path)
    backend = PipelineBackend(stages, backend_named("ort"), settings, launcher)
    return backend.open(stages.bundle, stages.bundle.manifest.main, BundleWeights(stages.bundle), 1)


def until(true: Callable[[], bool], seconds: float) -> None:
    """等到 ``true()`` 为真。

    Raises:
        RuntimeError: ``seconds`` 秒还没有。
    """
    limit = monotonic() + seconds
    while not true():
        if monotonic() > limit:
            raise RuntimeError(f"等了 {seconds:.0f} 秒")
        sleep(0.002)
