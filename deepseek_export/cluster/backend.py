"""一套 stage 当作后端：打开主模型就起好整套进程，草稿模块用同一套。"""

from __future__ import annotations

from deepseek_export.backend.base import Backend, CutRunner, Limits
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.gang import Gang, Launcher
from deepseek_export.cluster.local import LocalLauncher
from deepseek_export.cluster.runner import PipelineRunner, narrowest
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError


class PipelineBackend(Backend):
    """一套 stage；只打开它自己的 ``stages.bundle``。写成 ``with`` 就在退出时停掉进程，不写则由打开的 ``Runner`` 管。

    Args:
        stages: 哪一套。
        inner: 每个 stage 在哪个后端上跑。
        settings: 小批与各种等待的上限。
        launcher: 怎么起进程；缺省由 ``settings`` 定：在本机上，或用 Ray。
    """

    name = "pipeline"

    def __init__(
        self,
        stages: StageSet,
        inner: Backend,
        settings: ClusterSettings | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._stages, self._inner, self._launcher = stages, inner, launcher
        self._settings = settings or ClusterSettings()
        self._gang: Gang | None = None

    def __enter__(self) -> PipelineBackend:
        return self

    def __exit__(self, *_: object) -> None:
        if self._gang is not None:
            self._gang.close()

    def limits(self, bundle: Bundle, graph: GraphEntry | None = None) -> Limits:
        """每个 stage 都做得到的；引擎、形状各 stage 自己有。"""
        file = (graph or bundle.manifest.main).file
        opened = [Bundle.open(directory) for directory in self._stages.directories]
        found = [
            self._inner.limits(one, entry)
            for one in opened
            for entry in one.manifest.graphs
            if entry.file == file
        ]
        return narrowest(found)

    def open(
        self, bundle: Bundle, graph: GraphEntry, weights: BundleWeights, threads: int | None = None
    ) -> PipelineRunner:
        """同 :meth:`Backend.open`；第一次打开时起进程。

        Raises:
            DsxError: stage 打不开自己的 bundle，或 ``DSX-E744``，进程起不来。
        """
        if self._gang is None:
            self._gang = Gang(self._launcher or self._usual(threads), self._settings)
        return PipelineRunner(self._gang, graph, self._settings.micro_batches)

    def _usual(self, threads: int | None) -> Launcher:
        directories, settings, inner = self._stages.directories, self._settings, self._inner.name
        if settings.ray is None:
            return LocalLauncher(directories, inner, threads)
        # 到这里才导入：不用 Ray 的不必装它。
        from deepseek_export.cluster.ray_launcher import RayLauncher, stage_resources

        wanted = stage_resources(self._stages, inner, settings.cpus)
        return RayLauncher(directories, wanted, settings.ray, inner, threads, settings.strategy)

    def cut_runner(self, bundle: Bundle) -> CutRunner:
        """没有：图不在这里。

        Raises:
            DsxError: ``DSX-E748``。
        """
        raise DsxError(
            "DSX-E748", f"{bundle.path} 是一套 stage，逐块比不了", "dsx compare 用切开之前的 bundle"
        )
