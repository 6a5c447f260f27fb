"""Ray Serve 上的两个部署：入口，与几个副本。只在装了 Ray Serve 的地方导入。

入口在 ``@serve.ingress`` 下面是 :mod:`~deepseek_export.serving.http.front` 的应用；副本里是与 ``dsx serve`` 同一个 FastAPI 应用。交给哪个副本由
:class:`~deepseek_export.replicas.router.PrefixRouter` 定。
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException

from deepseek_export.cluster.ray_cluster import NAMESPACE, actor_resources
from deepseek_export.replicas.replica import Replica, ReplicaSpec
from deepseek_export.serving.http.affinity import Hint
from deepseek_export.serving.http.front import Message, ReplicaLost, create_front
from deepseek_export.serving.http.guards import App
from deepseek_export.serving.http.keys import KeyRing

#: 部署的名字。
FRONT, MODEL = "front", "model"
#: 一个副本这么久不答 Ray Serve 的检查，接连三次就换掉，秒。
CHECK_S = 10.0
#: 停下一个副本时，等手上的做完至多多少秒。
DRAIN_S = 30.0
#: 加载不了的，一共试这么多次。
_LOADS = 3
#: 起它的 ``dsx serve`` 没有了，隔这么多秒就看得到。
_LEASE_S = 5.0
#: 收多少由引擎自己定：满了的答 503，Ray Serve 不替它排队，探针才不会排在后面。
_UNLIMITED = 1 << 20


@dataclass(frozen=True)
class FrontSpec:
    """入口。

    Attributes:
        application: 应用的名字。
        lease: 起它的 ``dsx serve`` 握着的 actor 的名字；它没有了，Ray Serve 连同应用自己停下。
        keys: 认得的密钥。
        cors_origins: 允许哪些网页跨域来用。
    """

    application: str
    lease: str
    keys: KeyRing
    cors_origins: tuple[str, ...] = ()


class ModelReplica:
    """一个副本。"""

    def __init__(self, spec: ReplicaSpec) -> None:
        _log_to_stderr()
        self._replica = Replica(spec)

    async def ask(self, hint: Hint, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """见 :class:`~deepseek_export.serving.http.front.Replicas`。"""
        name = serve.get_replica_context().replica_tag
        yield {"type": "replica", "name": name}
        if name in hint.tried:
            return
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if not pending:
                await asyncio.Event().wait()  # 客户端走了，由取消来说
            return pending.pop()

        async def run() -> None:
            try:
                await self._replica.app({**scope, "root_path": ""}, receive, _put(said))
            finally:
                said.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await said.get()) is not None:
                yield message
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def check_health(self) -> None:
        """Ray Serve 隔一会儿问一次；抛了就换一个。"""
        if (trouble := self._replica.trouble()) is not None:
            raise RuntimeError(trouble)

    def __del__(self) -> None:
        with suppress(AttributeError):  # 加载失败的没有
            self._replica.close()


class Handed:
    """经 Ray Serve 的句柄交给副本。"""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True, method_name="ask")

    async def ask(self, hint: Hint, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """见 :class:`~deepseek_export.serving.http.front.Replicas`。"""
        answer = self._handle.remote(hint, dict(scope), body)
        try:
            async for message in answer:
                yield message
        except (ray.exceptions.RayActorError, RayServeException) as error:
            raise ReplicaLost from error
        finally:
            answer.cancel()


def application(spec: ReplicaSpec, replicas: tuple[int, int], front: FrontSpec) -> serve.Application:
    """整个应用；``replicas`` 两头相同就不伸缩。

    Raises:
        DsxError: 目录打不开。
    """
    low, high = replicas
    own, *stages = spec.resources
    options: dict[str, Any] = {"ray_actor_options": actor_resources(own)}
    if stages:
        options |= {
            "placement_group_bundles": [own, *stages],
            "placement_group_strategy": spec.cluster.strategy.upper(),
        }
    if low == high:
        options["num_replicas"] = low
    else:
        target = max(1, spec.engine.slots // 2)
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=low, max_replicas=high, target_ongoing_requests=target
        )
    router = {
        "request_router_class": "deepseek_export.replicas.router.PrefixRouter",
        "request_router_kwargs": {"full": spec.engine.slots},
    }
    model = serve.deployment(
        name=MODEL,
        request_router_config=router,
        max_ongoing_requests=_UNLIMITED,
        health_check_period_s=CHECK_S / 2,
        health_check_timeout_s=CHECK_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        **options,
    )(ModelReplica).options(max_constructor_retry_count=_LOADS)  # Ray 2.50 只在这里收它
    ingress = serve.deployment(
        name=FRONT,
        max_ongoing_requests=_UNLIMITED,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=DRAIN_S,
    )(_ingress(front))
    return ingress.bind(front, model.bind(spec))


def _ingress(spec: FrontSpec) -> Any:
    """入口的类；应用在它的进程里才造。"""

    def build() -> App:
        handle = serve.get_deployment_handle(MODEL, app_name=spec.application)
        return create_front(Handed(handle), spec.keys, spec.cors_origins)

    return serve.ingress(build)(Leased)


class Leased:
    """看着起它的 ``dsx serve``：没有了（被杀、机器没有了），把整个应用停下，不留在集群里。"""

    def __init__(self, spec: FrontSpec, model: Any) -> None:
        self._spec = spec
        threading.Thread(target=self._watch, name="dsx-lease", daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(_LEASE_S)
            try:
                ray.get_actor(self._spec.lease, namespace=NAMESPACE)
            except ValueError:
                serve.shutdown()
                return
            except ray.exceptions.RayError:  # 问不到：过一会儿再问
                continue


def _put(said: asyncio.Queue[Message | None]) -> Any:
    async def send(message: Message) -> None:
        said.put_nowait(message)

    return send


def _log_to_stderr() -> None:
    """请求的日志；Ray 把它递给起它的 ``dsx serve``。"""
    logger = logging.getLogger("dsx.serve")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
