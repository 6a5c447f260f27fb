"""证明 bundle 与 PyTorch 相等：``verify`` 与 ``compare``。"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.extras import require_export
from deepseek_export.parity.checks import DEFAULT_STEPS, LEVELS, Level
from deepseek_export.progress import Progress

# 用到时才导入：加载与生成不该等 torch、onnx。
if TYPE_CHECKING:
    from deepseek_export.parity.compare import ComparisonReport
    from deepseek_export.parity.report import ParityReport


def verify(
    bundle: Path | str,
    against: Path | str | None = None,
    *,
    levels: Sequence[Level] = LEVELS,
    prompts: Sequence[str] | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    text: Path | str | None = None,
    backend: str = "ort",
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> ParityReport:
    """证明 bundle 与 PyTorch 相等；参数见 :func:`~deepseek_export.parity.verify.verify_bundle`。

    一套 stage 连起来比 model、tokens 两级，每个 stage 再单独比。
    """
    require_export("校验")
    from deepseek_export.parity.verify import verify_bundle

    run = partial(
        verify_bundle,
        against=against,
        levels=levels,
        prompts=prompts,
        steps=steps,
        seed=seed,
        text=text,
        backend=backend,
        verify_weights=verify_weights,
        progress=progress,
    )
    if is_stage_set(bundle):
        stages = StageSet.open(bundle)
        with PipelineBackend(stages, backend_named(backend)) as pipeline:
            return run(stages.bundle, stages=stages, whole=pipeline)
    opened = Bundle.open(bundle)
    with opened.steady():
        return run(opened)


def compare(
    bundle: Path | str,
    against: Path | str | None = None,
    *,
    backends: Sequence[str] = ("ort",),
    blocks: Sequence[str] = (),
    bisect: bool = False,
    folder: Path | str | None = None,
    seed: int = 0,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> ComparisonReport:
    """PyTorch 与各后端逐块比；参数见 :func:`~deepseek_export.parity.compare.compare_bundle`。"""
    require_export("逐块比较")
    from deepseek_export.parity.compare import compare_bundle

    opened = Bundle.open(bundle)
    with opened.steady():
        return compare_bundle(
            opened,
            against,
            backends=backends,
            blocks=blocks,
            bisect=bisect,
            folder=folder,
            seed=seed,
            verify_weights=verify_weights,
            progress=progress,
        )
