"""NVIDIA 卡上插件的 kernel（KERNEL-7）；没有装 dsx 的机器上用 ``python -m perf.gpu``，量的是同样的东西。"""

from __future__ import annotations

from perf.gpu import session
from perf.results import SuiteResult
from perf.workload.workspace import Workspace

TITLE, FULL, QUICK = session.TITLE, session.FULL, session.QUICK
#: 到时间就不再开始新的点，秒。
BUDGET = 450


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """核对，计时。

    Raises:
        FileNotFoundError: 没有能用的 GPU。
        ImportError: 没有装 triton 或 cuda-bindings。
        RuntimeError: 核对不过，带每一项的差。
    """
    return SuiteResult.model_validate(session.measure(QUICK if quick else FULL, BUDGET))
