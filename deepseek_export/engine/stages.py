"""一套 stage → 每个 stage 一个引擎，放在它自己的 ``engines/`` 里；各有自己的 SM，因为各在各的机器上。"""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet
from deepseek_export.engine.build import BuiltEngine, build_engine
from deepseek_export.engine.derived import check_stage_buildable
from deepseek_export.engine.flavour import Flavour
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress


def stage_arches(stages: StageSet, sms: Sequence[int]) -> list[int]:
    """每个 stage 的 SM：只给一个就都用它，否则一个 stage 一个。

    Raises:
        DsxError: ``DSX-E736``，个数不对。
    """
    count = len(stages.record.stages)
    if len(sms) not in (1, count):
        shown = ",".join(f"sm{sm}" for sm in sms)
        raise DsxError(
            "DSX-E736",
            f"--arch {shown} 有 {len(sms)} 个，{stages.path} 有 {count} 个 stage",
            "给一个，各 stage 都用；或一个 stage 一个，例如 "
            + ",".join(f"sm{sm}" for sm in [sms[0]] * count),
        )
    return list(sms) * (count if len(sms) == 1 else 1)


def build_stages(
    stages: StageSet,
    sms: Sequence[int],
    flavour: Flavour,
    shapes: ProfileShapes,
    progress: Progress | None = None,
    *,
    verify_weights: bool = True,
) -> list[BuiltEngine]:
    """给每个 stage 建引擎；做到一半断了，再来一次整个重建。

    Args:
        stages: 目标是 TensorRT 的 float16、bfloat16 的 bundle 切成的。
        sms: 见 :func:`stage_arches`。
        flavour: 用哪种 TensorRT。
        shapes: 优化配置的形状，各 stage 相同：一步走遍它们。
        progress: 进度。
        verify_weights: 先读一遍全部权重，核对 sha256。

    Raises:
        DsxError: ``DSX-E735``，这套 stage 的图不能直接建引擎；``DSX-E736``，SM 的个数不对；其余见 :func:`~deepseek_export.engine.build.build_engine`。
    """
    progress = progress or Progress()
    wanted = stage_arches(stages, sms)
    bundles = [Bundle.open(directory) for directory in stages.directories]
    for bundle in bundles:
        check_stage_buildable(bundle)
    if verify_weights:
        stages.check_weights(progress)
    built = []
    for bundle, sm in zip(bundles, wanted, strict=True):
        progress.start(f"{bundle.path.name}：sm{sm}")
        built.append(build_engine(bundle, sm, flavour, shapes, progress))
    return built
