"""bundle → 别的样子：``pack``、``pack_stages``、``pack_triton``、``split``、``build``。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.extras import require_export
from deepseek_export.progress import Progress

# 用到时才导入：加载与生成不该等 torch、onnx。
if TYPE_CHECKING:
    from deepseek_export.engine.build import BuiltEngine
    from deepseek_export.engine.flavour import FlavourName
    from deepseek_export.engine.triton import TritonModel


def pack(bundle: Path | str, *, verify_weights: bool = True, progress: Progress | None = None) -> Bundle:
    """把按引用的 bundle 变成自包含的；见 :func:`~deepseek_export.bundle.pack.pack_bundle`。"""
    require_export("打包")
    from deepseek_export.bundle.pack import pack_bundle

    return pack_bundle(bundle, progress, verify_weights=verify_weights)


def pack_stages(
    stages: Path | str, *, verify_weights: bool = True, progress: Progress | None = None
) -> StageSet:
    """把一套按引用的 stage 变成自包含的；见 :func:`~deepseek_export.bundle.pack.pack_stages`。"""
    require_export("打包")
    from deepseek_export.bundle.pack import pack_stages

    return pack_stages(stages, progress, verify_weights=verify_weights)


def pack_triton(
    bundle: Path | str,
    repository: Path | str,
    name: str | None = None,
    *,
    slots: int = 8,
    context: int | None = None,
    engine: str | None = None,
    overwrite: bool = False,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> TritonModel:
    """写成 Triton Inference Server 的模型仓库里的一个模型；参数见 :func:`~deepseek_export.engine.triton.write_triton`，名字缺省是目录名。"""
    require_export("写 Triton 的模型仓库")
    from deepseek_export.engine.triton import write_triton

    opened = Bundle.open(bundle)
    with opened.steady():
        if verify_weights:
            opened.check_weights(progress or Progress())
        return write_triton(
            opened,
            Path(repository),
            opened.path.resolve().name if name is None else name,
            slots=slots,
            context=context,
            engine=engine,
            overwrite=overwrite,
        )


def split(
    bundle: Path | str,
    out: Path | str,
    stages: int | str,
    *,
    balance: Literal["bytes", "time"] = "bytes",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StageSet:
    """把 bundle 在层的边上切成一套 stage；见 :func:`~deepseek_export.bundle.split.split_bundle`。"""
    require_export("切分")
    from deepseek_export.bundle.split import split_bundle

    return split_bundle(bundle, out, stages, balance=balance, overwrite=overwrite, progress=progress)


def build(
    bundle: Path | str,
    sms: Sequence[int],
    *,
    flavour: FlavourName | None = None,
    shapes: str = "",
    checkpoint: Path | str | None = None,
    verify_weights: bool = True,
    progress: Progress | None = None,
) -> list[BuiltEngine]:
    """为几种 SM 各建一个 TensorRT 引擎；``rtx`` 不需要 GPU。

    Args:
        bundle: ``export`` 的输出目录；目标不是 TensorRT 的、float32 的，由检查点另导出一份来建，见
            :func:`~deepseek_export.engine.derived.buildable_bundle`。一套 stage 则每个 stage 建一个，见
            :func:`~deepseek_export.engine.stages.build_stages`。
        sms: 目标计算能力，例如 ``[89, 120]``；重复的只建一次。一套 stage 给一个，各 stage 都用；或一个 stage 一个。
        flavour: ``rtx`` 或 ``tensorrt``；缺省用装了的那个，先看 ``rtx``。
        shapes: 优化配置的形状，写法同 ``--profile-shapes``；缺省见 :class:`~deepseek_export.engine.shapes.ProfileShapes`。
        checkpoint: 要另导出时的检查点目录；缺省取 manifest 里记的出处。
        verify_weights: 先读一遍全部权重，核对 sha256。
        progress: 进度。

    Returns:
        每种 SM（一套 stage 是每个 stage）一个，按次序；``bundle`` 属性是实际由之建成的那个。

    Raises:
        DsxError: ``DSX-E910`` / ``DSX-E911`` 没有装 TensorRT 或缺库；4xx bundle 有问题；``DSX-E919`` 形状不对；``DSX-E912`` 有一种 SM
            建不了，都没有开始；``DSX-E735`` / ``DSX-E736`` 是一套 stage 的，图不能直接建、SM 的个数不对；其余见 ``buildable_bundle`` 与 :func:`~deepseek_export.engine.build.build_engine`。
    """
    require_export("建引擎")
    from deepseek_export.engine.build import build_engine
    from deepseek_export.engine.derived import buildable_bundle
    from deepseek_export.engine.flavour import check_arch, choose
    from deepseek_export.engine.flavour import load as load_tensorrt
    from deepseek_export.engine.shapes import ProfileShapes
    from deepseek_export.engine.stages import build_stages

    chosen = choose(flavour)
    wanted = list(dict.fromkeys(sms))
    stages = StageSet.open(bundle) if is_stage_set(bundle) else None
    opened = Bundle.open(bundle) if stages is None else stages.bundle
    parsed = ProfileShapes.parse(shapes, opened.manifest.model.max_position_embeddings)
    # 都先看一遍：不要建好前几个才发现后面的建不了。
    for sm in wanted:
        check_arch(chosen, load_tensorrt(chosen), sm)
    if stages is not None:
        if checkpoint is not None:
            (progress or Progress()).note("一套 stage 不另导出，--checkpoint 用不到")
        return build_stages(stages, sms, chosen, parsed, progress, verify_weights=verify_weights)
    source = buildable_bundle(opened, chosen, checkpoint, progress, verify_weights=verify_weights)
    return [build_engine(source, sm, chosen, parsed, progress) for sm in wanted]
