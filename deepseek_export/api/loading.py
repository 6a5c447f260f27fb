"""bundle → 可以生成的模型：``load``。"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle, read_bundle
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.progress import Progress


def load(
    bundle: Path | str,
    threads: int | None = None,
    backend: str = "ort",
    *,
    speculative_floor: bool = True,
    verify_weights: bool | None = None,
    progress: Progress | None = None,
    cluster: ClusterSettings | None = None,
) -> CompiledModel:
    """加载 bundle，准备生成；别人正在替换它的话，得到的是旧的或新的，不会一半一半。

    一套 stage（``dsx split`` 的输出目录）同样加载：在本机上给每个 stage 起一个进程，``CompiledModel.close`` 停掉它们。

    Args:
        bundle: ``export`` 的输出目录，或 ``split`` 的。
        threads: 线程数，正整数；缺省由 ONNX Runtime 决定。
        backend: ``ort`` 是 ONNX Runtime CPU；``trt`` 是 ``dsx build`` 为当前 GPU 建的引擎。
        speculative_floor: 投机解码不划算时退回普通解码；``False`` 一直投机。没有草稿模型时不起作用。
        verify_weights: 先读一遍全部权重，核对 sha256；``None`` 只读 sha256 取自下载记录、还没有核对过的（按引用的另抽查每个张量的几处），``False`` 一个也不读。其余的文件总是核对。
        progress: 核对权重的进度。
        cluster: 流水线的参数；只对一套 stage 起作用。

    Raises:
        DsxError: 4xx bundle 有问题，其中 ``DSX-E412`` 是接连几次读到一半被换掉；``DSX-E121`` 结束生成的 token 不能用；``DSX-E507`` / ``DSX-E508`` 模型加载失败；``DSX-E512`` ``threads`` 不是正整数；``DSX-E917`` / ``DSX-E918`` / ``DSX-E920``
            引擎用不了；一套 stage 另有 ``DSX-E741``，不完整，``DSX-E744``，进程起不来。
    """
    if is_stage_set(bundle):
        stages = StageSet.open(bundle)
        stages.confirm_weights(verify_weights, progress or Progress())
        pipeline = PipelineBackend(stages, backend_named(backend), cluster)
        return CompiledModel(stages.bundle, threads, pipeline, speculative_floor)

    def read(opened: Bundle) -> CompiledModel:
        if (stage := opened.manifest.stage) is not None and stage.count > 1:
            raise DsxError(
                "DSX-E748",
                f"{opened.path} 是 {stage.count} 个 stage 里的第 {stage.index} 个，单独生成不了",
                "给整套 stage 的目录（里面有 stages.json）",
            )
        opened.confirm_weights(verify_weights, progress or Progress())
        return CompiledModel(opened, threads, backend, speculative_floor)

    return read_bundle(bundle, read)
