"""NVIDIA 卡上插件的 kernel（KERNEL-7）：就是 ``python -m perf.gpu.accept``；没有装 dsx 的机器上直接用它。"""

from __future__ import annotations

from dataclasses import dataclass

from perf.gpu import record
from perf.gpu.accept import accept
from perf.gpu.card import Card
from perf.results import SuiteResult
from perf.workload.workspace import Workspace

TITLE = record.TITLE


@dataclass(frozen=True)
class Scenario:
    """做哪几步，一共至多几秒。"""

    phases: tuple[str, ...]
    budget: float


QUICK = Scenario(("environment", "smoke", "checks", "ceilings", "headline"), 240)
FULL = Scenario((*QUICK.phases, "awkward", "launcher", "runtime", "rest"), 900)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """核对，计时；不过的、没有做成的在第一格里写明，它们的点没有比值。

    Raises:
        FileNotFoundError: 没有能用的 GPU，或一步也没有做成。
        ImportError: 没有装 triton 或 cuda-bindings。
    """
    missing = Card.missing()
    if missing is not None:
        raise FileNotFoundError(missing)
    scenario, folder = QUICK if quick else FULL, workspace.folder / "gpu"
    accept(folder, scenario.budget, scenario.phases)
    return SuiteResult.model_validate(record.load(folder)["suites"][0])
