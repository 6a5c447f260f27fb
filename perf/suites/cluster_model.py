"""流水线的模拟对照测量（CLUSTER-62）：由一个 stage 量到的，预测 1、2、4 个 stage 一步多久，与量到的相比。

拿来预测的只有两样：一个 stage 的一步（一条与一个小批各量一遍），和其中的两条边：比切开之前的 bundle 在同一个核上的一步多出来的。
各 stage 占一步的几成由 ``dsx plan`` 的 roofline 定，别的由 :mod:`deepseek_export.plan.simulate` 走一遍。同一轮里量的配成一对。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.bundle.stages import StageSet
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.plan.balance import Span
from deepseek_export.plan.gpus import Gpu
from deepseek_export.plan.simulate import Station, Work, simulate
from deepseek_export.plan.sized import SizedModel
from deepseek_export.plan.stages import LayeredModel
from deepseek_export.profile import resolve_profile
from perf.isolate import Worker
from perf.results import Case, SuiteResult
from perf.workload.library import require_library
from perf.workload.pipelines import Alone, Pipeline
from perf.workload.workspace import Workspace

TITLE = "流水线的模拟对照测量"
_OVERRIDES = ("mla.cache_dtype=bfloat16",)
#: 只有内存带宽的机器：各 stage 的时间之比就是要读的字节之比。
_READER = Gpu("读", 1.0, 1.0, float("inf"), None, "只用来比")


@dataclass(frozen=True)
class Scenario:
    """固定的场景：int8 块 32；每个 stage 一个线程，第 i 个钉在第 ``i % 2`` 个核上。

    Attributes:
        shape: 形状。
        stages: 切成几个，头一个总是 1：拿来预测的在它上面量。
        rows, parts: 满的时候几行，分成几个小批。
        context: 每行的长度。
        steps, runs: 一个样本几步；几个样本。
    """

    shape: str = "wide-8"
    stages: tuple[int, ...] = (1, 2, 4)
    rows: int = 32
    parts: int = 8
    context: int = 512
    steps: int = 20
    runs: int = 9


FULL = Scenario()
QUICK = Scenario(shape="peers-2", stages=(1, 2), rows=4, parts=4, context=64, steps=10, runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子；线程数与它无关，每个 stage 总是一个线程。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
        RuntimeError: 进程起不来。
    """
    require_library()
    scenario = QUICK if quick else FULL
    checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
    bundle = workspace.bundle(
        checkpoint, "mla+moe", "float32", _OVERRIDES, Quantization(kind="int8", block=32)
    )
    model = SizedModel.open(checkpoint, resolve_profile("mla+moe", list(_OVERRIDES))).layered("int8")
    cases = []
    for count in scenario.stages:
        stages = _split(workspace.folder / f"model-{count}", bundle, count)
        cases += _cases(stages, bundle, workspace.folder / f"model-{scenario.stages[0]}", model, scenario)
    return SuiteResult(suite="cluster-model", title=TITLE, scenario=asdict(scenario), cases=cases)


def _split(out: Path, bundle: Path, count: int) -> StageSet:
    return api.split(bundle, out, count, balance="time")


def _cases(
    stages: StageSet, bundle: Path, whole: Path, model: LayeredModel, scenario: Scenario
) -> list[Case]:
    """切成这么多个的两格：单条与满。"""
    cores = sorted(os.sched_getaffinity(0))[:2]
    each = scenario.rows // scenario.parts
    path = str(stages.path)
    with ExitStack() as stack:

        def opened(kind: type, **options: Any) -> Callable[[], float]:
            worker = Worker(f"{kind.__module__}:{kind.__name__}", **options, context=scenario.context)
            stack.callback(worker.close)
            return partial(worker.ask, "step", count=scenario.steps)

        alone = {"path": str(bundle), "threads": 1, "cores": cores[:1]}
        found = interleaved(
            {
                "one": opened(Alone, rows=1, **alone),
                "batch": opened(Alone, rows=each, **alone),
                "one stage": opened(Pipeline, path=str(whole), cores=cores[:1], rows=1),
                "batch stage": opened(Pipeline, path=str(whole), cores=cores[:1], rows=each),
                "measured": opened(Pipeline, path=path, cores=cores, rows=1),
                "measured full": opened(
                    Pipeline, path=path, cores=cores, rows=scenario.rows, parts=scenario.parts
                ),
            },
            scenario.runs,
        )
    spans = [(item.layers[0], item.layers[-1] + 1) for item in stages.record.stages]
    depth = scenario.context - 1

    def predicted(step: str, stage: str, works: Sequence[Work]) -> list[float]:
        edge = _edge(found[step], found[stage])
        inner = [max(one - 2 * edge, 0.0) for one in found[stage]]
        return [prediction(model, spans, len(cores), one, edge, works) for one in inner]

    single = predicted("one", "one stage", [Work(1, 1, depth)])
    full = predicted("batch", "batch stage", [Work(each, each, each * depth)] * scenario.parts)
    name = f"{len(spans)} 个 stage"
    return [
        _case(f"{name}，单条", single, found["measured"]),
        _case(f"{name}，满", full, found["measured full"]),
    ]


def _edge(step: Sequence[float], stage: Sequence[float]) -> float:
    """一条边多久：一个 stage 的一步多出来的一半（一进一出两条），取各轮的中位数；量不出就是 0。"""
    return max(median(other - one for one, other in zip(step, stage, strict=True)), 0.0) / 2


def prediction(
    model: LayeredModel, spans: Sequence[Span], cores: int, step: float, edge: float, works: Sequence[Work]
) -> float:
    """一步要多久。

    一条边的时间，发的一端与收的一端各占一半，占着各自的核；发起的一端是另一个进程，不占 stage 的核。

    Args:
        model: 模型的每一层，各 stage 按它分一步的时间。
        spans: 切在哪里。
        cores: stage 轮流用几个核。
        step: 一个小批走完全部的层多久，不含边。
        edge: 一个小批过一条边多久。
        works: 一步的小批，都一样大。
    """
    shares = [model.cost(span, _READER).seconds(works[0]) for span in spans]
    total = sum(shares)

    def always(seconds: float) -> Callable[[Work], float]:
        return lambda work: seconds

    route = [Station("发", always(edge / 2))]
    for index, share in enumerate(shares):
        route.append(Station(f"core {index % cores}", always(step * share / total + edge)))
    route.append(Station("收", always(edge / 2)))
    return simulate(route, [works], len(spans)).seconds


def _case(name: str, predicted: Sequence[float], measured: Sequence[float]) -> Case:
    values = {"predicted.step_s": Spread.of(predicted), "measured.step_s": Spread.of(measured)}
    ratio = paired_ratio(values["predicted.step_s"], values["measured.step_s"])
    return Case(name=name, values=values, ratios={"预测/量到": ratio, "偏离": off(ratio)})


def off(ratio: Spread) -> Spread:
    """两个里大的除以小的：多了少了一样算。"""
    return Spread.of([max(one, 1 / one) for one in ratio.samples])
