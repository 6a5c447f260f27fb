"""用 Ray 起一套 stage：一个 placement group，每个 stage 一个 actor，守着它自己的进程。

Ray 只管放在哪里、看着、重起；stage 之间的信道是自己的，生成一个 token 不经过任何一次 Ray 调用。密钥随机生成，经 Ray 的控制面给各个 actor。
各台机器上要有同样的 dsx，并且在同样的路径上看得到这套 stage。
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.gang import Member, Started
from deepseek_export.cluster.handshake import accept, connect, listen
from deepseek_export.cluster.host import StageHost
from deepseek_export.cluster.ray_cluster import NAMESPACE, into, join, placed, remove
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.stage import StageSpec
from deepseek_export.cluster.tls import check_tls, secured
from deepseek_export.cluster.wire import Channel
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_ray

Strategy = Literal["pack", "spread"]
#: 停的时候，至多等一个 actor 几秒。
_LAST_CALL_S = 2.0


def stage_resources(stages: StageSet, backend: str, cpus: int) -> list[dict[str, float]]:
    """每个 stage 向 Ray 要什么：CPU、放得下它的权重的内存，在 GPU 上跑的另要一块 GPU。"""
    gpu: dict[str, float] = {"GPU": 1.0} if backend == "trt" else {}
    return [{"CPU": float(cpus), "memory": float(item.weight_bytes), **gpu} for item in stages.record.stages]


@dataclass(frozen=True)
class RayLauncher:
    """Ray 的启动器。

    Attributes:
        directories: 各 stage 的目录，每台机器上同样的路径。
        resources: 每个 stage 要什么，见 :func:`stage_resources`。
        address: 连哪个 Ray，见 :func:`~deepseek_export.cluster.ray_cluster.join`；已经连着的照旧用。``inside`` 是在一个 actor
            里，用它自己的 placement group：第一份是它的，后面依次是各 stage 的。
        backend, threads: 每个 stage 在哪里跑，几个线程；没有给就是它要的 CPU 数。
        strategy: ``pack`` 尽量放在一起，``spread`` 尽量分开。

    Raises:
        DsxError: ``DSX-E751``，没有装 Ray。
    """

    directories: Sequence[Path]
    resources: Sequence[Mapping[str, float]]
    address: str = "auto"
    backend: str = "ort"
    threads: int | None = None
    strategy: Strategy = "pack"

    def __post_init__(self) -> None:
        require_ray()

    def start(self, settings: ClusterSettings) -> Started:
        """占好位置、起 actor、连成环。

        Raises:
            DsxError: ``DSX-E754``，连不上 Ray；``DSX-E744``，资源不够，或 actor 起不来；``DSX-E749``，stage 之间连不上；``DSX-E756``，证书用不了。
        """
        check_tls(settings.tls)
        if self.address == "inside":
            ray: Any = import_module("ray")
            return self._start_in(ray, _own_group(), 1, settings, ())
        ray = join(self.address, sum(int(one["CPU"]) for one in self.resources))
        todo = "加机器，或少切几个 stage；dsx cluster status --ray auto 看还剩多少"
        name = self.directories[0].parent.name
        group = placed(self.resources, self.strategy, name, settings.start_s, todo)
        try:
            return self._start_in(ray, group, 0, settings, (_Placed(group),))
        except BaseException:
            remove(group)
            raise

    def _start_in(
        self, ray: Any, group: Any, offset: int, settings: ClusterSettings, also: tuple[Member, ...]
    ) -> Started:
        actors: list[Any] = []
        try:
            return self._ring(ray, group, offset, settings, also, actors)
        except ray.exceptions.RayError as error:
            _kill_all(ray, actors)
            raise DsxError("DSX-E744", f"Ray：{error}", "看 Ray 的日志；各台机器装同样的 dsx") from error
        except BaseException:
            _kill_all(ray, actors)
            raise

    def _ring(
        self,
        ray: Any,
        group: Any,
        offset: int,
        settings: ClusterSettings,
        also: tuple[Member, ...],
        actors: list[Any],
    ) -> Started:
        services: Any = import_module("ray.util")
        secret, gang, count = secrets.token_bytes(32), secrets.token_hex(4), len(self.directories)
        for index, wanted in enumerate(self.resources):
            options = {**into(group, offset + index, wanted), "name": f"stage-{gang}-{index}"}
            actors.append(ray.remote(_ActorHost).options(**options, namespace=NAMESPACE).remote(secret))
        addresses = ray.get([actor.address.remote() for actor in actors], timeout=settings.start_s)
        with listen(services.get_node_ip_address(), secret) as listening:
            mine: tuple[str, int] = listening.getsockname()[:2]
            starting = []
            for index, (actor, directory) in enumerate(zip(actors, self.directories, strict=True)):
                spec = StageSpec(
                    bundle=str(directory.resolve()),
                    index=index,
                    count=count,
                    backend=self.backend,
                    threads=self.threads or max(1, int(self.resources[index]["CPU"])),
                    silence_s=settings.silence_s,
                    start_s=settings.start_s,
                    upstream=-1,
                    downstream=-1,
                    parent=-1,
                    tls=None if settings.tls is None else astuple(settings.tls),
                )
                after = addresses[index + 1] if index + 1 < count else mine
                starting.append(actor.start.remote(spec, after, settings.start_s))
            with ThreadPoolExecutor(1) as pool:
                coming = pool.submit(accept, listening, secret, settings.start_s)
                first = connect(addresses[0], secret, settings.start_s)
                last = coming.result()
            ray.get(starting, timeout=settings.start_s)
        first = secured(first, settings.tls, False, settings.start_s)
        last = secured(last, settings.tls, True, settings.start_s)
        members: list[Member] = [_RayMember(ray, index, actor) for index, actor in enumerate(actors)]
        return Started(
            Channel(first, " stage 0 ", settings.silence_s),
            Channel(last, f" stage {count - 1} ", settings.start_s + settings.silence_s),
            (*members, *also),
        )


class _ActorHost(StageHost):
    """actor 里的那一个：在它所在机器的地址上等。"""

    def __init__(self, secret: bytes) -> None:
        services: Any = import_module("ray.util")
        super().__init__(services.get_node_ip_address(), secret)

    def describe(self) -> dict[str, Any]:
        """给 ``dsx cluster status`` 的：是哪一个，在哪台机器上，进程怎样了。"""
        ray: Any = import_module("ray")
        context = ray.get_runtime_context()
        where = {"node": context.get_node_id(), "group": context.get_placement_group_id()}
        return {**where, "actor_pid": os.getpid(), **self.told()}


class _RayMember:
    """一个 actor；问它的话总是只有一句在路上，不等。"""

    def __init__(self, ray: Any, index: int, actor: Any) -> None:
        self._ray, self._index, self._actor = ray, index, actor
        self._asked = actor.ended.remote()
        self._told: str | None = None

    @property
    def ended(self) -> str | None:
        if self._told is None and self._ray.wait([self._asked], timeout=0)[0]:
            try:
                how = self._ray.get(self._asked)
                self._asked = self._actor.ended.remote()
            except self._ray.exceptions.RayError as error:
                how = f"actor 没有了（{type(error).__name__}）"
            self._told = None if how is None else f"stage {self._index} 的{how}"
        return self._told

    def kill(self) -> None:
        # actor 自己没有了：它的 stage 由内核杀掉；停住了：信道一断，stage 自己退出。
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.kill.remote(), timeout=_LAST_CALL_S)
        self._ray.kill(self._actor)


@dataclass(frozen=True)
class _Placed:
    """占着的位置；停的时候最后放开。"""

    group: Any

    @property
    def ended(self) -> str | None:
        return None

    def kill(self) -> None:
        remove(self.group)


def _own_group() -> Any:
    """这个 actor 所在的 placement group。"""
    util: Any = import_module("ray.util")
    group = util.get_current_placement_group()
    if group is None:
        raise DsxError("DSX-E744", "ray='inside'，可这里不在一个 placement group 里", "用 auto，或 local")
    return group


def _kill_all(ray: Any, actors: Sequence[Any]) -> None:
    for actor in actors:
        with suppress(ray.exceptions.RayError):
            ray.kill(actor)
