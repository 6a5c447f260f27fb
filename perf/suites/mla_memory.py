"""MLA 的内存（MLA-4）：8192 个 token 的上下文里解码，baseline 对 mla，每个样本一个进程。"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from deepseek_export.benchmark.memory import MemorySample, memory_in_subprocess
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace

TITLE = "MLA 的内存"

#: 比值的散布不窄于 ±1 %：同样的两次运行，进程物理内存之比差过 0.3 %，最小的缓存（18 MiB）之比差过 0.9 %，而一次运行里的两三个样本常常
#: 只差万分之几。
RESOLUTION = 0.01


@dataclass(frozen=True)
class Scenario:
    """固定的场景；缓存直接填满，prefill 的激活不在内。"""

    shapes: tuple[str, ...] = ("v2-lite", "v3")
    batches: tuple[int, ...] = (1, 4)
    dtypes: tuple[str, ...] = ("float32", "float16")
    context: int = 8192
    runs: int = 3


FULL = Scenario()
QUICK = Scenario(batches=(1,), dtypes=("float32",), runs=2)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子。"""
    scenario = QUICK if quick else FULL
    cases = [
        _case(workspace, scenario, shape, batch, dtype, threads)
        for shape in scenario.shapes
        for dtype in scenario.dtypes
        for batch in scenario.batches
    ]
    return SuiteResult(suite="mla-memory", title=TITLE, scenario=asdict(scenario), cases=cases)


def _case(workspace: Workspace, scenario: Scenario, shape: str, batch: int, dtype: str, threads: int) -> Case:
    bundles = {
        profile: workspace.bundle(workspace.checkpoint(shape), profile, dtype)
        for profile in ("baseline", "mla")
    }

    def sampler(profile: str):
        def sample() -> MemorySample:
            found = memory_in_subprocess(bundles[profile], batch, scenario.context, threads)
            if found is None:
                raise RuntimeError("这个系统没有 /proc，量不了进程的内存")
            return found

        return sample

    samples = interleaved({profile: sampler(profile) for profile in bundles}, scenario.runs, warmup=0)
    values = {
        f"{profile}.{field}": Spread.of([getattr(sample, field) for sample in found])
        for profile, found in samples.items()
        for field in MemorySample.model_fields
    }
    ratios = {
        name: paired_ratio(values[f"mla.{field}"], values[f"baseline.{field}"]).at_least(RESOLUTION)
        for name, field in (("cache", "cache_resident"), ("process", "peak"))
    }
    return Case(
        name=f"{shape} b{batch} {dtype}", values=values, ratios=ratios, facts={"resolution": RESOLUTION}
    )
