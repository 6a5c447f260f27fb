"""``apply(model, "mla")`` 之后的一步解码（HF-12）：同一个 transformers 模型，替换前后交替各走一步。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.integration.apply import apply
from perf.peers.engines import Transformers
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "transformers 里的一步解码"
#: 系列 → 方案。
SERIES = {"transformers": "baseline", "mla": "mla"}


@dataclass(frozen=True)
class Scenario:
    """固定的场景：V2-Lite 的宽度、两层、float32、sdpa、batch 1；缓存直接填好，走完一步就退回。"""

    shape: str = "v2-lite-wide"
    contexts: tuple[int, ...] = (256, 1024, 4096, 8192)
    runs: int = 9


FULL = Scenario()
QUICK = Scenario(contexts=(1024, 8192), runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部上下文长度。"""
    scenario = QUICK if quick else FULL
    engine = Transformers(str(workspace.checkpoint(scenario.shape)), threads, "float32")

    def stepper(profile: str) -> Callable[[], float]:
        def step() -> float:
            apply(engine.model, profile)
            return engine.decode([1])

        return step

    cases = []
    for context in scenario.contexts:
        engine.go_to(context)
        steps = {name: stepper(profile) for name, profile in SERIES.items()}
        values = {f"{name}.step_s": Spread.of(s) for name, s in interleaved(steps, scenario.runs).items()}
        ratios = {"mla/transformers": paired_ratio(values["mla.step_s"], values["transformers.step_s"])}
        facts = {"context": context}
        cases.append(Case(name=f"context {context}", values=values, ratios=ratios, facts=facts))
    return SuiteResult(suite="apply", title=TITLE, scenario=asdict(scenario), cases=cases)
