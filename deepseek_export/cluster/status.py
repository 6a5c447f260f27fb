"""现在有什么在跑：本机上的 stage 进程；Ray 上的各台机器、占着的位置、stage、副本。

只看，不碰；问 Ray 的每一句都限时，不答的照实说没有回答。
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_export.cluster.ray_cluster import NAMESPACE, PREFIX, join
from deepseek_export.machine import process_memory

#: 各个 actor 一共等这么多秒。
ASK_S = 3.0
_PROC = Path("/proc")
_STATES = {"T": "stopped", "t": "stopped"}


def local_stages(proc: Path = _PROC) -> list[dict[str, Any]] | None:
    """本机上的 stage 进程，哪个 dsx 起的都算；没有 ``/proc`` 的系统看不到，是 ``None``。

    Returns:
        每个进程的 ``bundle``、``index``、``count``、``pid``、``parent``、``state``（``running`` 或 ``stopped``）、``resident``（字节）。
    """
    if not proc.is_dir():
        return None
    found = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                if (told := _stage_at(entry)) is not None:
                    found.append(told)
    return sorted(found, key=lambda one: (one["bundle"], one["index"], one["pid"]))


def _stage_at(entry: Path) -> dict[str, Any] | None:
    words = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    if "deepseek_export.cluster.stage" not in words[:3]:
        return None
    letter, parent = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
    if letter in "ZX":
        return None
    spec = json.loads(words[3])
    memory = process_memory(entry / "status")
    return {
        **{key: spec[key] for key in ("bundle", "index", "count")},
        "pid": int(entry.name),
        "parent": int(parent),
        "state": _STATES.get(letter, "running"),
        "resident": None if memory is None else memory.resident,
    }


def ray_status(address: str, seconds: float = ASK_S) -> dict[str, Any]:
    """Ray 上的：``nodes``、``free``、``groups``、``stages``、``replicas``。

    Args:
        address: 见 :func:`~deepseek_export.cluster.ray_cluster.join`。
        seconds: 各个 actor 一共等多少秒。

    Raises:
        DsxError: ``DSX-E751``，没有装 Ray；``DSX-E754``，连不上。
    """
    ray = join(address)
    util: Any = import_module("ray.util")
    names = util.list_named_actors(all_namespaces=True)
    return {
        "nodes": [_node(node) for node in ray.nodes()],
        "free": _amounts(ray.available_resources()),
        "groups": _groups(util.placement_group_table()),
        "stages": _stages(ray, [one["name"] for one in names if one["namespace"] == NAMESPACE], seconds),
        "replicas": _replicas(any(one["namespace"] == "serve" for one in names)),
    }


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    where = {"id": node["NodeID"], "host": node["NodeManagerHostname"], "address": node["NodeManagerAddress"]}
    return {**where, "alive": bool(node["Alive"]), "resources": _amounts(node["Resources"])}


def _amounts(resources: Mapping[str, float]) -> dict[str, float]:
    """CPU、GPU、内存（字节）；Ray 自己记账用的名字不要。"""
    return {key: resources[key] for key in ("CPU", "GPU", "memory") if key in resources}


def _groups(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """dsx 的 placement group：自己占的，与 Ray Serve 替副本占的；放开了的不算。"""
    return [
        {
            "id": one["placement_group_id"],
            "name": one["name"],
            "state": one["state"],
            "strategy": one["strategy"],
            "bundles": [
                {"resources": _amounts(wanted), "node": one["bundles_to_node_id"].get(index) or None}
                for index, wanted in sorted(one["bundles"].items())
            ],
        }
        for one in table.values()
        if PREFIX in one["name"] and one["state"] != "REMOVED"
    ]


def _stages(ray: Any, names: list[str], seconds: float) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {}
    for name in sorted(name for name in names if name.startswith("stage-")):
        with suppress(ValueError):  # 刚刚没有了
            asked[name] = ray.get_actor(name, namespace=NAMESPACE).describe.remote()
    answers = list(asked.values())
    answered = ray.wait(answers, num_returns=len(answers), timeout=seconds)[0] if answers else []
    return [
        _stage(ray, name, reference if reference in answered else None) for name, reference in asked.items()
    ]


def _stage(ray: Any, name: str, answered: Any) -> dict[str, Any]:
    """一个 stage；``silent`` 是没有回答：停住了，或正在等别的 stage 起来。"""
    _, gang, index = name.split("-")
    told: dict[str, Any] = {"gang": gang, "index": int(index), "state": "silent"}
    if answered is None:
        return told
    try:
        told |= ray.get(answered)
    except ray.exceptions.RayError as error:
        return {**told, "state": "gone", "ended": type(error).__name__}
    state = "ended" if told["ended"] is not None else "starting" if told["pid"] is None else "running"
    return {**told, "index": int(index), "state": state}


def _replicas(serving: bool) -> list[dict[str, Any]]:
    """Ray Serve 上 dsx 的各个应用；Serve 没有起来、没有装是空的。"""
    if not serving or find_spec("grpc") is None:
        return []
    serve: Any = import_module("ray.serve")
    return [
        {
            "application": name.removeprefix(PREFIX),
            "deployment": part,
            "status": str(deployment.status.value),
            "message": deployment.message,
            "states": dict(deployment.replica_states),
        }
        for name, application in serve.status().applications.items()
        if name.startswith(PREFIX)
        for part, deployment in application.deployments.items()
    ]
