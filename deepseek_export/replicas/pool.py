"""批量用的一池副本：每个是一个 Ray actor，死了、停住了的重起；请求交给手上最少的那个。

记账的（:mod:`~deepseek_export.serving.batch`）在发起的一端，只有它写答案：副本怎么死、请求重做几次，都不会丢一行、多一行。不用 Ray Data：它没有一件活的时限，
停住的 actor 就一直等（specs/cluster 的 CLUSTER-51）。
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deepseek_export.cluster.ray_cluster import into, join, placed, remove
from deepseek_export.errors import DsxError
from deepseek_export.replicas.replica import Replica, ReplicaSpec
from deepseek_export.serving.http.inside import post

#: 问一个副本还在不在，多久没有回答就当它停住了，杀掉重起，秒。
SILENCE_S = 30.0
_TICK_S = 0.5
#: 接连起不来这么多次就不再试。
_TRIES = 3
#: 503 之后这么多秒先不交给它。
_COOL_S = 1.0
_LAST_CALL_S = 5.0

logger = logging.getLogger("dsx.serve.replicas")


class Worker(Protocol):
    """一个副本所在的地方；各方法都不等。"""

    def loading(self) -> bool:
        """还在加载。

        Raises:
            DsxError: 加载不了的原因。
        """

    def alive(self) -> bool:
        """有没有死；每次顺便再问一句，久久不答由调用的人定。"""

    @property
    def heard_at(self) -> float:
        """上一次回答的时刻，``time.monotonic``。"""

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """做一个请求。

        Raises:
            WorkerLost: 做到一半死了。
        """

    def stop(self) -> None:
        """放掉；停着的也停得掉。限时。"""


class WorkerLost(Exception):
    """副本没有了。"""


@dataclass
class _Seat:
    """池里的一个位置：现在坐着的副本。"""

    worker: Worker
    started: float
    ready: bool = False
    lost: bool = False
    busy: int = 0
    cool_until: float = 0.0


class ReplicaPool:
    """几个副本。写成 ``with``，退出时都放掉。

    一个也没有起来过的，第一次起不来就算数；起来过的，接连 :data:`_TRIES` 次起不来才不再试。

    Args:
        start: 在第几个位置起一个副本；不等它加载。
        count: 几个。
        start_s: 一个副本加载至多多少秒。
        release: 都放掉之后做什么。
    """

    def __init__(
        self,
        start: Callable[[int], Worker],
        count: int,
        start_s: float,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._start, self._start_s, self._release = start, start_s, release
        self._failed: DsxError | None = None
        self._failures, self._worked = 0, False
        self._closing = threading.Event()
        self._seats: list[_Seat] = []
        # 发起的一端退出时不等它。
        self._thread = threading.Thread(target=self._keep, name="dsx-replicas", daemon=True)
        try:
            for index in range(count):
                self._seats.append(_Seat(start(index), time.monotonic()))
            self._thread.start()
        except BaseException:
            self._stop_all()
            raise

    def __enter__(self) -> ReplicaPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> int:
        """几个加载好了。"""
        return sum(seat.ready and not seat.lost for seat in self._seats)

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """交给手上最少的那个，等到有一个为止；它做到一半死了、停住了，答 503，由调用的人再来一次，那时会换一个。

        Raises:
            DsxError: 副本起不来：它说的错误，或 ``DSX-E755``。
        """
        while (seat := self._free()) is None:
            if self._failed is not None:
                raise self._failed
            await asyncio.sleep(_TICK_S / 5)
        seat.busy += 1
        try:
            status, answer = await seat.worker.post(path, body)
        except WorkerLost:
            seat.lost = True
            return 503, b"{}"
        finally:
            seat.busy -= 1
        if status == 503:
            seat.cool_until = time.monotonic() + _COOL_S
        return status, answer

    def close(self) -> None:
        """放掉全部副本；可以调几次。"""
        self._closing.set()
        self._thread.join()
        self._stop_all()

    def _free(self) -> _Seat | None:
        now = time.monotonic()
        ready = [seat for seat in self._seats if seat.ready and not seat.lost]
        warm = [seat for seat in ready if seat.cool_until <= now] or ready
        return min(warm, key=lambda seat: seat.busy, default=None)

    def _keep(self) -> None:
        try:
            while not self._closing.wait(_TICK_S) and self._failed is None:
                self._look()
        except Exception as error:
            logger.exception("看着副本的线程出了错")
            self._failed = _failed(f"看着副本的线程出了错：{error!r}")
        if self._failed is not None:  # 没有人重起它们了：还在的也放掉，谁也不一直等着
            for seat in self._seats:
                seat.lost = True
                seat.worker.stop()

    def _look(self) -> None:
        """看一遍，该换的换掉。"""
        for index, seat in enumerate(self._seats):
            try:
                why = self._trouble(seat)
                if why is not None:
                    self._replace(index, why)
            except DsxError as error:
                self._failures += 1
                if self._failures >= _TRIES or not self._worked:
                    self._failed = error
                    return
                self._replace(index, error.what)

    def _trouble(self, seat: _Seat) -> str | None:
        """起来过的，要换掉它的原因。

        Raises:
            DsxError: 起不来。
        """
        now, worker, alive = time.monotonic(), seat.worker, seat.worker.alive()
        if seat.ready:
            silent = now - worker.heard_at
            if not alive or seat.lost:
                return "没有了"
            return f"{silent:.0f} 秒没有回答" if silent > SILENCE_S else None
        if not alive:
            raise _failed("加载时没有了")
        if not worker.loading():
            seat.ready = self._worked = True
            self._failures = 0
        elif now - seat.started > self._start_s:
            raise _failed(f"{self._start_s:g} 秒还没有加载好")
        return None

    def _replace(self, index: int, why: str) -> None:
        logger.warning("副本 %d：%s，重起", index, why)
        seat = self._seats[index]
        seat.lost = True
        seat.worker.stop()
        self._seats[index] = _Seat(self._start(index), time.monotonic())

    def _stop_all(self) -> None:
        for seat in self._seats:
            seat.worker.stop()
        self._release()


def _failed(what: str) -> DsxError:
    return DsxError("DSX-E755", what, "看 Ray 的日志与 dsx cluster status --ray auto；确认内存够用")


def ray_pool(spec: ReplicaSpec, count: int) -> ReplicaPool:
    """在 Ray 上起 ``count`` 个副本；``spec.cluster.ray`` 说连哪个。

    Raises:
        DsxError: ``DSX-E751`` / ``DSX-E754``，没有装 Ray，或连不上；``DSX-E744``，资源不够；目录打不开。
    """
    wanted = spec.resources
    ray = join(spec.cluster.ray or "auto", count * sum(int(one["CPU"]) for one in wanted))
    todo = "加机器，或少几个副本；dsx cluster status --ray auto 看还剩多少"
    groups: list[Any] = []

    def release() -> None:
        while groups:
            remove(groups.pop())

    try:
        for index in range(count):
            name = f"{spec.name}:{index}"
            groups.append(placed(wanted, spec.cluster.strategy, name, spec.cluster.start_s, todo))
        start = partial(_start, ray, spec, groups, wanted[0])
        return ReplicaPool(start, count, spec.cluster.start_s, release)
    except BaseException:
        release()
        raise


def _start(
    ray: Any, spec: ReplicaSpec, groups: Sequence[Any], wanted: Mapping[str, float], index: int
) -> Worker:
    return _RayWorker(ray, spec, into(groups[index], 0, wanted))


class _Actor:
    """actor 里的：一个副本。"""

    def __init__(self) -> None:
        self._replica: Replica | None = None

    async def load(self, spec: ReplicaSpec) -> tuple[str, str, str] | None:
        """加载；不成就返回错误的码、事、建议。"""
        try:
            self._replica = await asyncio.to_thread(Replica, spec)
        except DsxError as error:
            return error.code, error.what, error.todo
        return None

    async def beat(self) -> None:
        """还在。"""

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """做一个请求。"""
        assert self._replica is not None
        return await post(self._replica.app, path, body)

    async def close(self) -> None:
        """停下。"""
        if self._replica is not None:
            await asyncio.to_thread(self._replica.close)


class _RayWorker:
    """Ray 上的一个副本。"""

    def __init__(self, ray: Any, spec: ReplicaSpec, options: Mapping[str, Any]) -> None:
        self._ray = ray
        many = 2 * spec.engine.slots + 16  # 做着的，与心跳、停下
        self._actor = ray.remote(_Actor).options(**options, max_concurrency=many).remote()
        self._loaded: Any = self._actor.load.remote(spec)
        self._asked: Any = self._actor.beat.remote()
        self._heard_at = time.monotonic()

    @property
    def heard_at(self) -> float:
        return self._heard_at

    def loading(self) -> bool:
        if not self._ray.wait([self._loaded], timeout=0)[0]:
            return True
        try:
            told = self._ray.get(self._loaded)
        except self._ray.exceptions.RayError as error:  # 看它在不在之后、到这里之前死的
            raise _failed("加载时没有了") from error
        if told is not None:
            raise DsxError(*told)
        return False

    def alive(self) -> bool:
        if not self._ray.wait([self._asked], timeout=0)[0]:
            return True
        try:
            self._ray.get(self._asked)
        except self._ray.exceptions.RayError:
            return False
        self._heard_at = time.monotonic()
        self._asked = self._actor.beat.remote()
        return True

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        try:
            status, answer = await self._actor.post.remote(path, body)
        except self._ray.exceptions.RayActorError as error:
            raise WorkerLost from error
        return status, answer

    def stop(self) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.close.remote(), timeout=_LAST_CALL_S)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)
