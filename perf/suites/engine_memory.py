"""V2-Lite 的 int8 引擎放不放得进一张 24 GB 的卡（TRT-18）：真的建出 27 层，读 TensorRT 自己报的字节数。不需要 GPU，什么也不计时。"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deepseek_export.benchmark.spread import Spread
from deepseek_export.engine.flavour import FLAVOURS
from perf import isolate
from perf.results import Case, SuiteResult
from perf.workload import engine_memory
from perf.workload.workspace import Workspace

TITLE = "引擎占多少显存"
#: 一张 24 GB 的卡。
CARD = 24e9


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        model: ``tools/published_configs.json`` 里的键。
        kind: 权重的码。
        layers: 建几种深度；27 是 V2-Lite 的全部。
    """

    model: str = "V2_LITE"
    kind: str = "int8"
    layers: tuple[int, ...] = (3, 27)


FULL = Scenario()
QUICK = Scenario(layers=(2,))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """每种深度建一个引擎，各在自己的进程里；线程数与它们无关。

    Raises:
        ImportError: 没有装 TensorRT-RTX。
        FileNotFoundError: 没有 gcc。
    """
    scenario = QUICK if quick else FULL
    if FLAVOURS["rtx"].version() is None:
        raise ImportError(f"没有装 {FLAVOURS['rtx'].module}")
    library = engine_memory.blocks_library(workspace.folder)
    # kernel 与捕获只编译一遍，留在这次测量自己的缓存里：不计时。
    cache = {"DSX_NO_CACHE": "0", "DSX_HOME": str(workspace.folder / "cache")}
    environment = {"LD_PRELOAD": str(library), "DSX_BLOCKS": str(workspace.folder), **cache}
    cases = []
    for layers in scenario.layers:
        found = isolate.call(
            "perf.workload.engine_memory:build",
            environment,
            name=scenario.model,
            layers=layers,
            kind=scenario.kind,
            folder=str(workspace.folder),
        )
        cases.append(_case(f"{layers} 层", found))
    return SuiteResult(suite="engine-memory", title=TITLE, scenario=asdict(scenario), cases=cases)


def _case(name: str, found: dict[str, Any]) -> Case:
    """一个引擎：权重、两个配置里大的中间值、缓存，与它们的和。"""
    workspace = max(found["workspace"].values())
    total = found["weights"] + workspace + found["caches"]
    values = {
        "weights": found["weights"],
        "workspace": workspace,
        "caches": found["caches"],
        "total": total,
        "plan_bytes": found["plan_bytes"],
    }
    facts = ("given", "workspace", "shapes", "engine_layers")
    return Case(
        name=name,
        values={f"dsx.{key}": Spread.of([float(value)]) for key, value in values.items()},
        ratios={"显存/24 GB": Spread.of([total / CARD])},
        facts={key: found[key] for key in facts} | {"tensorrt_rtx": FLAVOURS["rtx"].version()},
    )
