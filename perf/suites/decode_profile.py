"""一步解码的时间花在哪里：ONNX Runtime 自己的剖析按算子汇总，外加主机循环的份额。

主机循环的份额是一步的墙钟时间里不在 ONNX Runtime 的 ``model_run`` 之内的那部分；剖析本身有开销，节点很多的图会把它算进主机一侧，
所以那是上界。没有门槛：只说明别的几套量到的时间由什么组成。
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.benchmark.depth import fill_caches
from deepseek_export.benchmark.spread import Spread
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cpu_library import library_for
from deepseek_export.runtime import ModelSession
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "一步解码花在哪里"


@dataclass(frozen=True)
class Scenario:
    """固定的场景：``peers`` 的 ``dsx int8 块 128``，batch 1；缓存直接填好。"""

    shape: str = "0.9B"
    depths: tuple[int, ...] = (0, 8192)
    steps: int = 40


FULL = Scenario()
QUICK = Scenario(shape="peers-2", depths=(0,), steps=5)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """剖析每一种深度。"""
    scenario = QUICK if quick else FULL
    checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
    quantization = Quantization(kind="int8", block=128)
    bundle = workspace.bundle(checkpoint, "mla+moe", "float32", ("mla.cache_dtype=bfloat16",), quantization)
    cases = [_profile(bundle, depth, scenario.steps, threads, workspace.folder) for depth in scenario.depths]
    return SuiteResult(suite="decode-profile", title=TITLE, scenario=asdict(scenario), cases=cases)


def open_profiled(
    out: Path, threads: int, folder: Path
) -> tuple[ModelSession, Callable[[], list[dict[str, Any]]]]:
    """打开了剖析的会话，其余与运行时用的相同；第二个停止剖析并给出全部事件（写在 ``folder``）。"""
    bundle = Bundle.open(out)
    runner = OrtRunner(
        bundle.model_path,
        threads=threads,
        max_positions=bundle.manifest.model.max_position_embeddings,
        initializers=BundleWeights(bundle).arrays(bundle.manifest.main.by_recipe),
        library=library_for(bundle.manifest.target),
        profile=folder / "profile",
    )
    return ModelSession(runner), runner.profile_events


def _profile(out: Path, depth: int, steps: int, threads: int, folder: Path) -> Case:
    session, events = open_profiled(out, threads, folder)
    caches = session.new_caches(1, depth + steps + 1)
    fill_caches(caches, depth, seed=0)
    walls = []
    for step in range(steps + 1):
        began = perf_counter()
        session.run(np.array([[1]]), np.array([depth + step]), np.array([[0]]), caches)
        walls.append(perf_counter() - began)
    found, runs, operators = events(), [], defaultdict[str, float](float)
    # 第一步要分配、要把权重读进来，不算。
    first = sorted(event["ts"] for event in found if event["name"] == "model_run")[1]
    for event in found:
        if event["ts"] < first:
            continue
        if event["name"] == "model_run":
            runs.append(event["dur"] / 1e6)
        elif event["name"].endswith("_kernel_time"):
            operators[event["args"]["op_name"]] += event["dur"] / 1e6 / steps
    values = {"dsx.step_s": Spread.of(walls[1:]), "onnxruntime.step_s": Spread.of(runs)}
    facts = {
        "depth": depth,
        "host_share": 1 - statistics.median(runs) / statistics.median(walls[1:]),
        "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
    }
    return Case(name=f"depth {depth}", values=values, facts=facts)
