"""一个副本：加载模型，开引擎，与 ``dsx serve`` 同一个应用；在哪个进程里都可以。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepseek_export import api
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.cluster.ray_launcher import stage_resources
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.serving import EngineSettings
from deepseek_export.serving.http.inside import app_of
from deepseek_export.serving.http.service import ServedModel

#: 流水线断了，副本自己会起来，不必换一个。
_RESTARTING = frozenset({"DSX-E742", "DSX-E743", "DSX-E747"})


@dataclass(frozen=True)
class ReplicaSpec:
    """起一个副本要知道的；各台机器上在同样的路径看得到 ``source``。

    Attributes:
        source: bundle 或一套 stage 的目录。
        name: 模型名。
        engine: 引擎的参数。
        cluster: 流水线的参数；``ray`` 由这里定。
        threads, backend: 在哪里跑，几个线程；没有给就是要的 CPU 数。
        verify_weights: 加载之前读一遍哪些权重，核对 sha256，同 ``api.load``。
        tool_parser: 模型怎么写工具调用。
        log_prompts: 日志里写上提示词。
    """

    source: Path
    name: str
    engine: EngineSettings
    cluster: ClusterSettings
    threads: int | None = None
    backend: str = "ort"
    verify_weights: bool | None = None
    tool_parser: str | None = None
    log_prompts: bool = False

    @property
    def resources(self) -> list[dict[str, float]]:
        """向 Ray 要的：第一份给副本自己；切开了的，后面依次是各 stage 的。

        Raises:
            DsxError: 目录打不开。
        """
        cpus = self.cluster.cpus
        if is_stage_set(self.source):
            return [{"CPU": 1.0}, *stage_resources(StageSet.open(self.source), self.backend, cpus)]
        recipes = Bundle.open(self.source).manifest.weights.recipes
        wanted = {"CPU": float(cpus), "memory": float(sum(one.nbytes for one in recipes.values()))}
        return [{**wanted, "GPU": 1.0} if self.backend == "trt" else wanted]


class Replica:
    """加载好的一个副本。用完要 :meth:`close`。

    Args:
        spec: 起什么。
        inside: 在一个占好了位置的 actor 里，切开了的各 stage 放进它的 placement group；不然照 ``spec.cluster``。

    Attributes:
        served: 模型与引擎。
        app: 与 ``dsx serve`` 同一个 ASGI 应用，谁都放行。

    Raises:
        DsxError: 模型加载不了的原因。
    """

    def __init__(self, spec: ReplicaSpec, inside: bool = True) -> None:
        cluster = spec.cluster
        if inside:
            cluster = ClusterSettings(**{**vars(cluster), "ray": "inside"})
        self._model = api.load(
            spec.source,
            spec.threads or (cluster.cpus if inside else None),
            spec.backend,
            verify_weights=spec.verify_weights,
            cluster=cluster,
        )
        try:
            engine = self._model.engine(spec.engine)
            opened = ServedModel.open(
                spec.name, self._model.tokenizer, self._model.session, engine, spec.tool_parser
            )
        except BaseException:
            self._model.close()
            raise
        self.served, self.app = opened, app_of(opened, spec.log_prompts)

    def trouble(self) -> str | None:
        """要换掉这个副本的原因；好好的、自己会好的是 ``None``。"""
        failure = self.served.engine.failure
        trouble = self.served.pulse.trouble()
        if isinstance(failure, DsxError) and failure.code in _RESTARTING:
            return None
        return trouble

    def close(self) -> None:
        """停下引擎，没有做完的取消；切开了的连同各 stage。"""
        self._model.close()
