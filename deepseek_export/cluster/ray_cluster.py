"""连上 Ray，向它要资源：启动器、副本、批量、``dsx cluster status`` 都从这里走。

连接限时：Ray 自己等一个不答的地址可以等很久。
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from typing import Any

from deepseek_export.errors import DsxError
from deepseek_export.extras import require_ray

#: dsx 起的 actor 都有名字，在这个命名空间里。
NAMESPACE = "dsx"
#: placement group 的名字以它开头。
PREFIX = "dsx:"
#: 连上 Ray 至多多少秒；写明了地址的，先看那里有没有人听，至多 :data:`_KNOCK_S` 秒。
JOIN_S = 60.0
_KNOCK_S = 5.0


def join(address: str, cpus: int | None = None, seconds: float = JOIN_S) -> Any:
    """连上 Ray，返回 ``ray`` 模块；已经连着的照旧用。

    Args:
        address: ``auto`` 连已经在跑的，``local`` 在本进程里起一个，或 ``HOST:PORT``。
        cpus: ``local`` 起的那个有几个 CPU。
        seconds: 至多等多少秒。

    Raises:
        DsxError: ``DSX-E751``，没有装 Ray；``DSX-E754``，连不上。
    """
    require_ray()
    ray: Any = import_module("ray")
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"address": address}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": cpus}
    else:
        _knock(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    start = partial(
        ray.init, namespace=NAMESPACE, log_to_driver=True, logging_level=logging.WARNING, **options
    )
    done: Future[Any] = Future()
    threading.Thread(target=_settle, args=(done, start), name="dsx-ray-init", daemon=True).start()
    try:
        done.result(seconds)
    except TimeoutError as error:
        raise unreachable(address, f"{seconds:g} 秒还没有连上") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise unreachable(address, str(error)) from error
    return ray


def unreachable(address: str, why: str) -> DsxError:
    """``DSX-E754``。"""
    todo = "先 ray start --head，别的机器 ray start --address=…，再给 --ray auto；或 --ray local"
    return DsxError("DSX-E754", f"{address}：{why}", todo)


def placed(
    bundles: Sequence[Mapping[str, float]], strategy: str, name: str, seconds: float, todo: str
) -> Any:
    """占好一个 placement group，等到每份都占到。

    Args:
        bundles: 每份要什么。
        strategy: ``pack`` 或 ``spread``。
        name: :data:`PREFIX` 之后的名字。
        seconds: 至多等多少秒。
        todo: 占不到时建议什么。

    Raises:
        DsxError: ``DSX-E744``，到时还没有占到；占了一半的放开。
    """
    util: Any = import_module("ray.util")
    group = util.placement_group(
        [dict(bundle) for bundle in bundles], strategy=strategy.upper(), name=f"{PREFIX}{name}"
    )
    try:
        if group.wait(timeout_seconds=seconds):
            return group
    except BaseException:
        remove(group)
        raise
    remove(group)
    wanted = "；".join(" ".join(f"{key} {value:g}" for key, value in bundle.items()) for bundle in bundles)
    raise DsxError("DSX-E744", f"{seconds:g} 秒内占不到 {len(bundles)} 份资源：{wanted}", todo)


def remove(group: Any) -> None:
    """放开一个 placement group。"""
    util: Any = import_module("ray.util")
    util.remove_placement_group(group)


def into(group: Any, index: int, resources: Mapping[str, float]) -> dict[str, Any]:
    """把一个 actor 放进第 ``index`` 份的选项；子 actor 不跟着进来。"""
    scheduling: Any = import_module("ray.util.scheduling_strategies")
    where = scheduling.PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=index
    )
    return {**actor_resources(resources), "scheduling_strategy": where, "max_restarts": 0}


def actor_resources(resources: Mapping[str, float]) -> dict[str, Any]:
    """一份资源写成 actor 的选项；没有写的就是不要，Ray 的缺省不算数。"""
    found: dict[str, Any] = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
    }
    if "memory" in resources:
        found["memory"] = resources["memory"]
    return found


def _knock(address: str) -> None:
    host, separator, port = address.rpartition(":")
    if not separator:
        return
    if "://" in address:
        raise unreachable(address, "不能经过 Ray Client：dsx 自己也要在这个 Ray 的一台机器上")
    if not port.isdigit():
        raise unreachable(address, "不是 auto、local 或 HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()
    except (OSError, OverflowError) as error:
        raise unreachable(address, getattr(error, "strerror", None) or str(error)) from error


def _settle(done: Future[Any], start: Any) -> None:
    try:
        done.set_result(start())
    except BaseException as error:
        done.set_exception(error)
