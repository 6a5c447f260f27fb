"""一步解码的时间花在哪里，加起来是不是整个一步：kernel、等线程、ONNX Runtime 每个节点、会话、主机循环。

墙钟是没有打开剖析的会话走的，与打开的轮流；各部分：

- kernel 与等线程来自 ONNX Runtime 自己的剖析：每个节点的用时，与线程池在其中分活、等别的线程的用时；
- 每个节点的开销另用一串几乎不算什么的节点量，不打开剖析：多一个节点多几微秒，乘节点数。剖析让每个节点长得多：这样一个节点在剖析里多长，
  就从每个 kernel 里减去多少；
- 主机循环是剖析的一步里不在 ``model_run`` 之内的，会话是 ``model_run`` 里不在执行器之内的。

没有门槛：只说明别的几套量到的时间由什么组成。
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.backend.ort.session import SessionSettings, open_session
from deepseek_export.benchmark.depth import fill_caches
from deepseek_export.benchmark.spread import Spread, interleaved
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint.weight_only import QuantBlock, Quantization, QuantKind
from deepseek_export.cpu_library import library_for
from deepseek_export.runtime import ModelSession
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "一步解码花在哪里"
KERNELS, WAITS, NODES, SESSION, HOST = "kernel", "等线程", "每个节点", "会话", "主机循环"
_WAITING = ("Distribution", "DistributionEnqueue", "Wait", "WaitRevoke")
_KERNEL = "_kernel_time"
_MICRO = 1e-6
#: 量每个节点的开销：短的与长的两串，各走几遍。
_CHAINS, _CHAIN_RUNS = (100, 700), 30


@dataclass(frozen=True)
class Scenario:
    """固定的场景：``peers`` 的 ``dsx int8`` 与 ``dsx int4``，batch 1；缓存直接填好。"""

    shape: str = "0.9B"
    kinds: tuple[QuantKind, ...] = ("int8", "int4")
    block: QuantBlock = 32
    depths: tuple[int, ...] = (0, 8192)
    steps: int = 40


FULL = Scenario()
QUICK = Scenario(shape="peers-2", kinds=("int8",), depths=(0,), steps=5)


class NodeCost(NamedTuple):
    """一个几乎不算什么的节点要几秒：不打开剖析时，与剖析里看到的。"""

    plain: float
    profiled: float


class Account(NamedTuple):
    """剖析的几步，平均每步的秒数。

    Attributes:
        operators: 算子 → kernel 的用时，等线程的、剖析自己的不算。
        waits: 分活、等别的线程。
        nodes: 每步几个节点。
        session: ``model_run`` 里不在执行器之内的。
        run: ``model_run``。
    """

    operators: dict[str, float]
    waits: float
    nodes: int
    session: float
    run: float


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """剖析每一种位数、每一种深度。"""
    scenario = QUICK if quick else FULL
    checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
    each = node_cost(threads, workspace.folder)
    cases = []
    for kind in scenario.kinds:
        quantization = Quantization(kind=kind, block=scenario.block)
        bundle = workspace.bundle(
            checkpoint, "mla+moe", "float32", ("mla.cache_dtype=bfloat16",), quantization
        )
        for depth in scenario.depths:
            cases.append(
                profile(
                    bundle, f"{kind} depth {depth}", depth, scenario.steps, threads, each, workspace.folder
                )
            )
            print("\n".join(lines(cases[-1])))
    return SuiteResult(suite="decode-profile", title=TITLE, scenario=asdict(scenario), cases=cases)


def open_profiled(
    out: Path, threads: int, folder: Path
) -> tuple[ModelSession, Callable[[], list[dict[str, Any]]]]:
    """打开了剖析的会话，其余与运行时用的相同；第二个停止剖析并给出全部事件（写在 ``folder``）。"""
    runner = _runner(out, threads, folder / "profile")
    return ModelSession(runner), runner.profile_events


def _runner(out: Path, threads: int, profile: Path | None = None) -> OrtRunner:
    bundle = Bundle.open(out)
    return OrtRunner(
        bundle.model_path,
        threads=threads,
        max_positions=bundle.manifest.model.max_position_embeddings,
        initializers=BundleWeights(bundle).arrays(bundle.manifest.main.by_recipe),
        library=library_for(bundle.manifest.target),
        profile=profile,
    )


def node_cost(threads: int, folder: Path) -> NodeCost:
    """不打开剖析的是两串长短不同的节点之差；都取最快的一遍：慢的几遍里是别的进程。"""

    def timed(length: int, profile: Path | None = None) -> tuple[float, list[dict[str, Any]]]:
        session = open_session(_chain(length), SessionSettings(threads=threads, profile=profile)).session
        seconds = []
        for _ in range(_CHAIN_RUNS):
            began = perf_counter()
            session.run(None, {"x": np.ones(1, np.float32)})
            seconds.append(perf_counter() - began)
        return min(seconds), [] if profile is None else _read_profile(session)

    short, long = (timed(length)[0] for length in _CHAINS)
    own = [event["dur"] for event in _kernels(timed(_CHAINS[-1], folder / "chain")[1])]
    fastest = min(sum(own[start : start + _CHAINS[-1]]) for start in range(0, len(own), _CHAINS[-1]))
    plain = max(long - short, 0.0) / (_CHAINS[-1] - _CHAINS[0])
    return NodeCost(plain, fastest * _MICRO / _CHAINS[-1])


def _read_profile(session: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return found


def _chain(length: int) -> bytes:
    """``length`` 个几乎不算什么的节点，一个接一个。"""
    names = ["x", *(f"x{i}" for i in range(1, length)), "y"]
    nodes = [
        helper.make_node("Neg" if i % 2 else "Abs", [names[i]], [names[i + 1]], name=f"node{i}")
        for i in range(length)
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    model = helper.make_model(
        helper.make_graph(nodes, "chain", [x], [y]), opset_imports=[helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model.SerializeToString()


def profile(out: Path, name: str, depth: int, steps: int, threads: int, each: NodeCost, folder: Path) -> Case:
    """一格：没有剖析的与剖析的轮流走同一步。"""
    profiled, events = open_profiled(out, threads, folder)
    sessions = {"dsx": ModelSession(_runner(out, threads)), "profiled": profiled}
    caches = {key: session.new_caches(1, depth + 1) for key, session in sessions.items()}
    for made in caches.values():
        fill_caches(made, depth, seed=0)

    def step(key: str) -> Callable[[], float]:
        def walk() -> float:
            began = perf_counter()
            sessions[key].run(np.array([[1]]), np.array([depth]), np.array([[0]]), caches[key])
            return perf_counter() - began

        return walk

    walls = interleaved({key: step(key) for key in sessions}, steps)
    found = account(events(), steps, each.profiled)
    parts = {
        KERNELS: sum(found.operators.values()),
        WAITS: found.waits,
        NODES: each.plain * found.nodes,
        SESSION: found.session,
        HOST: max(statistics.mean(walls["profiled"]) - found.run, 0.0),
    }
    return Case(
        name=name,
        values={f"{key}.step_s": Spread.of(seconds) for key, seconds in walls.items()},
        facts={
            "depth": depth,
            "parts": parts,
            "accounted": sum(parts.values()) / statistics.mean(walls["dsx"]),
            "nodes": found.nodes,
            "operators": dict(sorted(found.operators.items(), key=lambda item: -item[1])),
        },
    )


def account(events: list[dict[str, Any]], steps: int, own: float) -> Account:
    """剖析的最后 ``steps`` 步；之前的要分配、要把权重读进来，不算。``own`` 是剖析里每个节点自己的那几秒。"""
    runs = sorted((event for event in events if event["name"] == "model_run"), key=lambda event: event["ts"])
    first = runs[-steps]["ts"]
    late = [event for event in events if event["ts"] >= first]
    operators, waits, nodes = defaultdict[str, float](float), 0.0, 0
    for event in _outermost(_kernels(late)):
        waited = _waited(event["args"])
        seconds = max((event["dur"] - waited) * _MICRO - own, 0.0)
        operators[event["args"]["op_name"]] += seconds / steps
        waits += min(waited, event["dur"]) * _MICRO / steps
        nodes += 1
    executors = (event for event in late if event["name"] == "SequentialExecutor::Execute")
    executed = sum(event["dur"] for event in _outermost(executors))
    whole = sum(event["dur"] for event in runs[-steps:])
    return Account(
        operators=dict(operators),
        waits=waits,
        nodes=nodes // steps,
        session=(whole - executed) * _MICRO / steps,
        run=whole * _MICRO / steps,
    )


def _kernels(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (event for event in events if event["name"].endswith(_KERNEL))


def _outermost(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """不在别的之内的：If、Loop 的分支里的节点已经算在它自己里。"""
    end = 0
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event


def _waited(args: dict[str, Any]) -> int:
    """这个节点里主线程分活与等别的线程，微秒。"""
    stats = args.get("thread_scheduling_stats")
    if not isinstance(stats, dict):  # 只有一个线程时没有线程池
        return 0
    return sum(stats["main_thread"].get(key, 0) for key in _WAITING)


def lines(case: Case) -> list[str]:
    """一格印成表：各部分、各算子，毫秒与占一步的几成。"""
    whole = statistics.mean(case.values["dsx.step_s"].samples)
    rows = [*case.facts["parts"].items(), *((f"  {name}", s) for name, s in case.facts["operators"].items())]
    head = f"{case.name}：一步 {whole * 1e3:.2f} ms，{case.facts['nodes']} 个节点，说清了 {case.facts['accounted']:.1%}"
    return [head, *(f"  {seconds * 1e3:8.3f} ms {seconds / whole:6.1%}  {name}" for name, seconds in rows)]
