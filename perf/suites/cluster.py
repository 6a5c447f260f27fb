"""一套 stage（CLUSTER-30 至 32）：过一条边的开销，流水线填满时的吞吐，断了之后客户等多久、整套多久又起来。

都在一台机器上，进程钉在核上；对手是切开之前的同一个 bundle。相等由契约测试看，这里只看时间。要 C++ 算子库与 Linux。
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.weight_only import Quantization
from perf.isolate import Worker
from perf.results import Case, SuiteResult
from perf.workload.faults import FAULTS, Faulted
from perf.workload.library import require_library
from perf.workload.pipelines import Alone, Pipeline
from perf.workload.workspace import SHAPES, Workspace

TITLE = "一套 stage"
#: 承诺的上限，比值以它们为分母：过一条边；出事之后的回答（``silence_s`` 缺省的 5 秒，加弄清是谁的 1 秒与轮询）。
EDGE_S, LONGEST_S = 1e-4, 7.0


@dataclass(frozen=True)
class Scenario:
    """固定的场景：int8 块 32，单条序列的一步，或满流水线的一步；每个 stage 一个线程、一个核，轮流用各个核。

    Attributes:
        shapes: 过边的 hidden、回来的 logits、V3 的宽度各用哪个形状。
        stages: 过一条边的开销，切成几个来量。
        steps, runs: 一个样本几步；几个样本。
        rows, parts, full_runs: 填满流水线的：几行，分成几个小批；几个样本。
        context: 量流水线时每行的长度。
        faults, clients, new_tokens, fault_runs: 出哪些事，几个客户，一个回答几个 token，各几次。
    """

    shapes: tuple[str, str, str] = ("edge", "edge-vocab", "v3-wide")
    stages: tuple[int, ...] = (1, 2, 4)
    steps: int = 300
    runs: int = 9
    rows: int = 32
    parts: int = 32
    full_runs: int = 7
    context: int = 1024
    faults: tuple[str, ...] = FAULTS
    clients: int = 4
    new_tokens: int = 32
    fault_runs: int = 5


FULL = Scenario()
QUICK = Scenario(
    shapes=("edge-small", "edge-small", "edge-small"),
    stages=(2,),
    steps=30,
    runs=3,
    rows=4,
    parts=4,
    full_runs=3,
    context=64,
    faults=("SIGKILL", "递得慢"),
    clients=3,
    new_tokens=16,
    fault_runs=1,
)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子；线程数只用在没有切开的一边，至多两个。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
        RuntimeError: 进程起不来，或有请求一直没有回答。
    """
    require_library()
    scenario = QUICK if quick else FULL
    edge, logits, wide = scenario.shapes
    cases = [_edge(workspace, scenario, edge, count) for count in scenario.stages]
    cases += [_logits(workspace, scenario, logits), *_wide(workspace, scenario, wide)]
    cases += _faults(workspace, scenario, edge)
    return SuiteResult(suite="cluster", title=TITLE, scenario=asdict(scenario), cases=cases)


def _edge(workspace: Workspace, scenario: Scenario, shape: str, count: int) -> Case:
    """单条序列的一步多出来的时间，摊在 ``count + 1`` 条边上：发起的一端 → 各个 stage → 发起的一端。"""
    step = _one_stream(workspace, scenario, shape, count)
    edge = difference(step["stages"], step["one"], 1 / (count + 1))
    return Case(
        name=f"边 {count} 个 stage",
        values=_steps(step) | {"stages.edge_s": edge},
        ratios={"每条边/100 µs": edge.scaled(1 / EDGE_S)},
        facts={"edge_bytes": SHAPES[shape]["hidden_size"] * 4},
    )


def _logits(workspace: Workspace, scenario: Scenario, shape: str) -> Case:
    """最后一条边上还有一行 logits：整个词表。"""
    step = _one_stream(workspace, scenario, shape, 2)
    added = difference(step["stages"], step["one"])
    return Case(
        name=f"词表 {SHAPES[shape]['vocab_size']}",
        values=_steps(step) | {"stages.added_s": added},
        facts={"edge_bytes": SHAPES[shape]["vocab_size"] * 4},
    )


def _wide(workspace: Workspace, scenario: Scenario, shape: str) -> list[Case]:
    """V3 的宽度，每个 stage 两层：单条序列多出几成；填满时与两个核上的一个进程比；整套重起。"""
    steps = max(scenario.steps // 30, 3)
    step = _one_stream(workspace, scenario, shape, 2, steps)
    single = Case(
        name="V3 的宽度，2 × 2 层",
        values=_steps(step) | {"stages.added_s": difference(step["stages"], step["one"])},
        ratios={"一步 2 个 stage/一个进程": paired_ratio(step["stages"], step["one"])},
    )
    bundle, pinned = _bundle(workspace, shape), cores()
    common = {"rows": scenario.rows, "parts": scenario.parts, "context": scenario.context, "cores": pinned}
    with _workers(
        {
            "one": (Alone, {"path": str(bundle), "threads": len(pinned), **common}),
            "stages": (Pipeline, {"path": str(_stages(workspace, bundle, len(pinned))), **common}),
        }
    ) as workers:
        asked = {name: partial(worker.ask, "step", count=1) for name, worker in workers.items()}
        found = {name: Spread.of(all_) for name, all_ in interleaved(asked, scenario.full_runs).items()}
        restart = Spread.of([workers["stages"].ask("restart") for _ in range(scenario.fault_runs)])
    token = {name: spread.scaled(1 / scenario.rows) for name, spread in found.items()}
    full = Case(
        name=f"流水线满 {len(pinned)} 个核",
        values={f"{name}.token_s": spread for name, spread in token.items()} | {"stages.restart_s": restart},
        ratios={"每个 token 流水线/一个进程": paired_ratio(token["stages"], token["one"])},
        facts={"weight_bytes": _weight_bytes(bundle)},
    )
    return [single, full]


def _faults(workspace: Workspace, scenario: Scenario, shape: str) -> list[Case]:
    """每种事轮流出：等得最久的客户，与整套又起来。"""
    path = _stages(workspace, _bundle(workspace, shape), 2)
    options = {"path": str(path), "clients": scenario.clients, "new_tokens": scenario.new_tokens}
    with _workers({"stages": (Faulted, options)}) as workers:
        ask = workers["stages"].ask
        found: Mapping[str, list[dict[str, float]]] = interleaved(
            {name: partial(ask, "suffer", name=name) for name in scenario.faults},
            scenario.fault_runs,
            warmup=0,
        )
    cases = []
    for name, samples in found.items():
        spreads = {key: Spread.of([one[key] for one in samples]) for key in samples[0]}
        cases.append(
            Case(
                name=f"断 {name}",
                values={f"stages.{key}": spread for key, spread in spreads.items()},
                ratios={"等得最久/7 s": spreads["longest_s"].scaled(1 / LONGEST_S)},
            )
        )
    return cases


def _one_stream(
    workspace: Workspace, scenario: Scenario, shape: str, count: int, steps: int | None = None
) -> dict[str, Spread]:
    """单条序列的一步：一个进程一个线程，与 ``count`` 个 stage。"""
    bundle, pinned = _bundle(workspace, shape), cores()
    with _workers(
        {
            "one": (Alone, {"path": str(bundle), "threads": 1, "cores": pinned[:1]}),
            "stages": (Pipeline, {"path": str(_stages(workspace, bundle, count)), "cores": pinned}),
        }
    ) as workers:
        asked = {
            name: partial(worker.ask, "step", count=steps or scenario.steps)
            for name, worker in workers.items()
        }
        return {name: Spread.of(all_) for name, all_ in interleaved(asked, scenario.runs).items()}


@contextmanager
def _workers(wanted: Mapping[str, tuple[type, Mapping[str, Any]]]) -> Iterator[dict[str, Worker]]:
    opened: dict[str, Worker] = {}
    try:
        for name, (kind, options) in wanted.items():
            opened[name] = Worker(f"{kind.__module__}:{kind.__name__}", **options)
        yield opened
    finally:
        for worker in opened.values():
            worker.close()


def _bundle(workspace: Workspace, shape: str) -> Path:
    checkpoint = workspace.checkpoint(shape, dtype="bfloat16")
    return workspace.bundle(
        checkpoint, "mla+moe", "float32", ("mla.cache_dtype=bfloat16",), Quantization(kind="int8", block=32)
    )


def _stages(workspace: Workspace, bundle: Path, count: int) -> Path:
    """切好的一套；切过的不再切。"""
    out = workspace.folder / f"{bundle.name}-in-{count}"
    return out if out.exists() else api.split(bundle, out, count).path


def cores() -> list[int]:
    """用哪两个核；只有一个就用一个。"""
    return sorted(os.sched_getaffinity(0))[:2]


def difference(longer: Spread, shorter: Spread, factor: float = 1.0) -> Spread:
    """逐对相减。"""
    pairs = zip(longer.samples, shorter.samples, strict=True)
    return Spread.of([(one - other) * factor for one, other in pairs])


def _steps(step: Mapping[str, Spread]) -> dict[str, Spread]:
    return {f"{name}.step_s": spread for name, spread in step.items()}


def _weight_bytes(bundle: Path) -> int:
    return sum(recipe.nbytes for recipe in Bundle.open(bundle).manifest.weights.recipes.values())
