"""用 Ray Serve 起几个副本：起好，看着，停下；``dsx serve --replicas`` 的一生。"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from importlib import import_module
from ipaddress import ip_address
from typing import Any

from deepseek_export.cluster.ray_cluster import NAMESPACE, PREFIX, join
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_ray_serve
from deepseek_export.replicas.replica import ReplicaSpec
from deepseek_export.serving.http.keys import KeyRing

_POLL_S = 1.0
_UP = "RUNNING"

logger = logging.getLogger("dsx.serve")


class ReplicaService:
    """一个集群上的一个应用：:meth:`start`、:meth:`watch`，最后总要 :meth:`close`，什么也不留。

    Args:
        spec: 每个副本起什么；``spec.cluster.ray`` 说连哪个 Ray。
        replicas: 至少、至多几个；相同就不伸缩。
        address: HTTP 的地址与端口；回环的只在 Ray 的头一台机器上听，别的在有副本的各台上。
        keys: 认得的密钥。
        cors_origins: 允许哪些网页跨域来用。

    Raises:
        DsxError: ``DSX-E751`` / ``DSX-E752`` / ``DSX-E754``，没有装，或连不上；``DSX-E753``，这个 Ray 上已经有 Ray Serve；目录打不开。
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        replicas: tuple[int, int],
        address: tuple[str, int],
        keys: KeyRing | None = None,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        require_ray_serve()
        self.application = f"{PREFIX}{spec.name}"
        self._spec, self._told = spec, ""
        cpus = replicas[1] * sum(int(one["CPU"]) for one in spec.resources)
        ray = join(spec.cluster.ray or "auto", cpus)
        util: Any = import_module("ray.util")
        if any(one["namespace"] == "serve" for one in util.list_named_actors(all_namespaces=True)):
            todo = "先停下它（serve shutdown），或另起一个 Ray：一个 Ray 只有一个 HTTP 的地址"
            raise DsxError("DSX-E753", "这个 Ray 上已经有 Ray Serve 在跑", todo)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._serve: Any = import_module("ray.serve")
        # 到这里才导入：它要 Ray Serve。
        from deepseek_export.replicas.deployment import FrontSpec, application

        lease = f"lease-{secrets.token_hex(4)}"
        self._lease = ray.remote(_Lease).options(name=lease, namespace=NAMESPACE, num_cpus=0).remote()
        front = FrontSpec(self.application, lease, keys or KeyRing(), cors_origins)
        self._target = application(spec, replicas, front)
        self._address = address

    def start(self, stopped: Callable[[float], bool]) -> bool:
        """起好为止；中途要停了返回假。

        Args:
            stopped: 等这么多秒，要停了返回真。

        Raises:
            DsxError: ``DSX-E755``，副本起不来，或太久。
        """
        host, port = self._address
        where = "HeadOnly" if ip_address(host).is_loopback else "EveryNode"
        self._serve.start(proxy_location=where, http_options={"host": host, "port": port})
        target = self._serve.RunTarget(self._target, name=self.application, route_prefix="/")
        self._serve.run_many([target], wait_for_applications_running=False)
        seconds = self._spec.cluster.start_s
        until = time.monotonic() + seconds
        while not stopped(_POLL_S):
            state, told = self._state()
            if state == _UP:
                return True
            self._say(told)
            if state == "DEPLOY_FAILED":
                todo = "看 Ray 的日志；每台机器要在同样的路径看得到模型"
                raise DsxError("DSX-E755", _reason(told), todo)
            if time.monotonic() > until:
                what = f"{seconds:g} 秒还没有起好：{_reason(told)}"
                raise DsxError("DSX-E755", what, "看 dsx cluster status --ray auto：资源够不够")
        return False

    def watch(self, stopped: Callable[[float], bool]) -> None:
        """看到 ``stopped`` 为真为止；有变化就写进日志。

        Args:
            stopped: 等这么多秒，要停了返回真。

        Raises:
            DsxError: ``DSX-E755``，应用没有了。
        """
        while not stopped(_POLL_S):
            state, told = self._state()
            if state is None:
                raise DsxError("DSX-E755", f"{self.application} 被别人停下了", "重新 dsx serve")
            self._say(told)

    def close(self) -> None:
        """做完手上的，停下 Ray Serve；限时。可以调几次。"""
        self._serve.shutdown()

    def _state(self) -> tuple[str | None, str]:
        """应用怎样了，与要说的话；没有了是 ``None``。"""
        found = self._serve.status().applications.get(self.application)
        if found is None:
            return None, ""
        parts = [found.message, *(one.message for one in found.deployments.values())]
        return str(found.status.value), "；".join(part for part in dict.fromkeys(parts) if part)

    def _say(self, told: str) -> None:
        if told and told != self._told:
            logger.warning("Ray Serve：%s", _reason(told))
        self._told = told


class _Lease:
    """握在 ``dsx serve`` 手里的 actor：它没有了，入口就知道该停了。"""


def _reason(told: str) -> str:
    """Ray Serve 的话里有 dsx 自己的错误就只要它，不要 traceback。"""
    found = re.search(r"(DSX-E\d{3}) ([^\n]*)\n\s*([^\n]*)", told)
    return f"{found[1]} {found[2]}：{found[3]}" if found else told.strip()[-500:] or "没有说原因"
