"""MoE 的吞吐（MOE-5）：同样的总参数，稀疏专家对每个专家都算，对稠密模型。"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.model import CompiledModel
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace, parameter_count

TITLE = "MoE 的吞吐"
#: 系列 → 形状与方案；``dense`` 的总参数与 MoE 相同，只差 router。
SERIES = {"moe": ("wide-4", "mla+moe"), "off": ("wide-4", "mla"), "dense": ("wide-4-dense", "mla")}


@dataclass(frozen=True)
class Scenario:
    """固定的场景：32 个专家选 4 个，另有 1 个共享，float32。"""

    batches: tuple[int, ...] = (1, 8)
    prompt_len: int = 256
    new_tokens: int = 32
    runs: int = 5


FULL = Scenario()
QUICK = Scenario(batches=(1,), prompt_len=64, new_tokens=8, runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子。"""
    scenario = QUICK if quick else FULL
    models = {
        name: api.load(workspace.bundle(workspace.checkpoint(shape), profile), threads)
        for name, (shape, profile) in SERIES.items()
    }
    parameters = {name: parameter_count(workspace.checkpoint(shape)) for name, (shape, _) in SERIES.items()}
    cases = []
    for batch in scenario.batches:
        rng = np.random.default_rng(0)
        rows = rng.integers(0, models["moe"].session.vocab_size, (batch, scenario.prompt_len)).tolist()

        def runner(model: CompiledModel, rows: list[list[int]] = rows):
            return lambda: model.generate(rows, scenario.new_tokens, ignore_eos=True)

        runs = interleaved({name: runner(model) for name, model in models.items()}, scenario.runs)
        values = {}
        for name, found in runs.items():
            values[f"{name}.prefill_s"] = Spread.of([r.prefill_s for r in found])
            values[f"{name}.token_s"] = Spread.of([r.decode_s / r.decode_tokens for r in found])
        ratios = {
            f"{phase} moe/{other}": paired_ratio(values[f"moe.{field}"], values[f"{other}.{field}"])
            for phase, field in (("decode", "token_s"), ("prefill", "prefill_s"))
            for other in ("off", "dense")
        }
        facts = {"parameters": parameters, "batch": batch, "prompt_tokens": batch * scenario.prompt_len}
        cases.append(Case(name=f"b{batch}", values=values, ratios=ratios, facts=facts))
    return SuiteResult(suite="moe", title=TITLE, scenario=asdict(scenario), cases=cases)
