"""用 Ray 起一套 stage：一个 placement group，每个 stage 一个 actor，守着它自己的进程。

Ray 只管放在哪里、看着、重起；stage 之间的信道是自己的，生成一个 token 不经过任何一次 Ray 调用。密钥随机生成，经 Ray 的控制面给各个 actor。
各台机器上要有同样的 dsx，并且在同样的路径上看得到这套 stage。
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from deepseek_export.cluster.gang import Member, Started
from deepseek_export.cluster.handshake import accept, connect, listen
from deepseek_export.cluster.host import StageHost
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.stage import StageSpec
from deepseek_export.cluster.wire import Channel
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_ray

Strategy = Literal["pack", "spread"]
#: 停的时候，至多等一个 actor 几秒。
_LAST_CALL_S = 2.0


@dataclass(frozen=True)
class RayLauncher:
    """Ray 的启动器。

    Attributes:
        directories: 各 stage 的目录，每台机器上同样的路径。
        address: 连哪个 Ray；``auto`` 连已经在跑的，``local`` 在本进程里起一个。已经连着的照旧用。
        backend, threads: 每个 stage 在哪里跑，几个线程；没有给就是 ``cpus``。
        cpus: 每个 stage 向 Ray 要几个 CPU。
        strategy: ``pack`` 尽量放在一起，``spread`` 尽量分开。

    Raises:
        DsxError: ``DSX-E751``，没有装 Ray。
    """

    directories: Sequence[Path]
    address: str = "auto"
    backend: str = "ort"
    threads: int | None = None
    cpus: int = 1
    strategy: Strategy = "pack"

    def __post_init__(self) -> None:
        require_ray()

    def start(self, settings: ClusterSettings) -> Started:
        """占好位置、起 actor、连成环。

        Raises:
            DsxError: ``DSX-E744``，连不上 Ray，资源不够，或 actor 起不来；``DSX-E749``，stage 之间连不上。
        """
        ray: Any = import_module("ray")
        self._join(ray)
        group = self._place(settings.start_s)
        try:
            return self._start_in(ray, group, settings)
        except ray.exceptions.RayError as error:
            _remove(group)
            raise DsxError("DSX-E744", f"Ray：{error}", "看 Ray 的日志；各台机器装同样的 dsx") from error
        except BaseException:
            _remove(group)
            raise

    def _join(self, ray: Any) -> None:
        if ray.is_initialized():
            return
        own: dict[str, Any] = {"include_dashboard": False, "num_cpus": self.cpus * len(self.directories)}
        options = {"address": "local", **own} if self.address == "local" else {"address": self.address}
        try:
            ray.init(**options, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            todo = "先 ray start --head，别的机器 ray start --address=…；或 --ray local"
            raise DsxError("DSX-E744", f"连不上 Ray（{self.address}）：{error}", todo) from error

    def _place(self, seconds: float) -> Any:
        """每个 stage 一份资源；等到都占好。"""
        util: Any = import_module("ray.util")
        bundles = [{"CPU": float(self.cpus)} for _ in self.directories]
        group = util.placement_group(bundles, strategy=self.strategy.upper())
        if not group.wait(timeout_seconds=seconds):
            _remove(group)
            what = f"{seconds:g} 秒内占不到 {len(bundles)} 份各 {self.cpus} 个 CPU"
            raise DsxError("DSX-E744", what, "加机器，或少切几个 stage；ray status 看还剩多少")
        return group

    def _start_in(self, ray: Any, group: Any, settings: ClusterSettings) -> Started:
        scheduling: Any = import_module("ray.util.scheduling_strategies")
        services: Any = import_module("ray.util")
        secret, count = secrets.token_bytes(32), len(self.directories)
        actors = []
        for index in range(count):
            where = scheduling.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            )
            options = {"num_cpus": self.cpus, "scheduling_strategy": where, "max_restarts": 0}
            actors.append(ray.remote(_ActorHost).options(**options).remote(secret))
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
                    threads=self.threads or self.cpus,
                    silence_s=settings.silence_s,
                    start_s=settings.start_s,
                    upstream=-1,
                    downstream=-1,
                    parent=-1,
                )
                after = addresses[index + 1] if index + 1 < count else mine
                starting.append(actor.start.remote(spec, after, settings.start_s))
            with ThreadPoolExecutor(1) as pool:
                coming = pool.submit(accept, listening, secret, settings.start_s)
                first = connect(addresses[0], secret, settings.start_s)
                last = coming.result()
            ray.get(starting, timeout=settings.start_s)
        members: list[Member] = [_RayMember(ray, index, actor) for index, actor in enumerate(actors)]
        return Started(
            Channel(first, " stage 0 ", settings.silence_s),
            Channel(last, f" stage {count - 1} ", settings.start_s + settings.silence_s),
            (*members, _Placed(group)),
        )


class _ActorHost(StageHost):
    """actor 里的那一个：在它所在机器的地址上等。"""

    def __init__(self, secret: bytes) -> None:
        services: Any = import_module("ray.util")
        super().__init__(services.get_node_ip_address(), secret)


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
        _remove(self.group)


def _remove(group: Any) -> None:
    util: Any = import_module("ray.util")
    util.remove_placement_group(group)
