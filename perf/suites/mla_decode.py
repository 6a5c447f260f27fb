"""解码一步的时间随上下文怎么走（MLA-6）：baseline、naive、absorb 与 transformers，同一份检查点、同一个进程里交替。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from deepseek_export import api
from deepseek_export.benchmark.depth import DepthDecoder
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from perf.peers.engines import Transformers
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "解码一步的时间与上下文"
#: 系列 → 方案与覆盖项。
SERIES = {
    "baseline": ("baseline", ()),
    "naive": ("mla", ("mla.form=naive",)),
    "absorb": ("mla", ("mla.form=absorb",)),
}
PEER = "transformers"


@dataclass(frozen=True)
class Scenario:
    """固定的场景：V2-Lite 的头，两层，float32。"""

    shape: str = "v2-lite-2"
    batch: int = 1
    contexts: tuple[int, ...] = (256, 1024, 4096, 8192, 16384)
    runs: int = 7


FULL = Scenario()
QUICK = Scenario(contexts=(256, 8192), runs=5)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部上下文长度。"""
    scenario = QUICK if quick else FULL
    checkpoint = workspace.checkpoint(scenario.shape)
    sessions = {
        name: api.load(workspace.bundle(checkpoint, profile, "float32", overrides), threads).session
        for name, (profile, overrides) in SERIES.items()
    }
    peer = Transformers(str(checkpoint), threads, "float32", batch=scenario.batch)
    cases = []
    for context in scenario.contexts:
        steps: dict[str, Callable[[], float]] = {
            name: DepthDecoder(session, scenario.batch, context).step for name, session in sessions.items()
        }
        peer.go_to(context - 1)
        steps[PEER] = partial(peer.decode, [0])
        values = {f"{name}.step_s": Spread.of(s) for name, s in interleaved(steps, scenario.runs, 2).items()}
        ratios = {
            f"absorb/{other}": paired_ratio(values["absorb.step_s"], values[f"{other}.step_s"])
            for other in ("baseline", "naive", PEER)
        }
        cases.append(
            Case(name=f"context {context}", values=values, ratios=ratios, facts={"context": context})
        )
    return SuiteResult(suite="mla-decode", title=TITLE, scenario=asdict(scenario), cases=cases)
