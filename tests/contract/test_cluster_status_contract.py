"""specs/cluster 的 CLUSTER-50：看有什么在跑，连不上 Ray 限时说清。"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.serve
import ray.util
from click.testing import CliRunner

import deepseek_export
from deepseek_export.cli.cluster import command
from deepseek_export.cluster import ray_cluster, status
from deepseek_export.cluster.ray_cluster import join
from deepseek_export.cluster.status import local_stages
from tests.engines import refused
from tests.integration.cli import dsx
from tests.serving_http import until
from tests.stages import children, loaded, write_five

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status")
    bundle = deepseek_export.export(write_five(folder / "ck"), folder / "out", "full").path
    return deepseek_export.split(bundle, folder / "stages", 2).path


def mine(stages: Path) -> list[dict[str, object]]:
    """这套 stage 的；别的测试起的不算。"""
    found = local_stages()
    assert found is not None
    return [one for one in found if str(one["bundle"]).startswith(f"{stages}/")]


@pytest.mark.heavy
def test_local_stages_are_listed(stages):
    """CLUSTER-50：本机上的 stage：哪一套的第几个、进程、内存、停没停着；停掉就没有了。"""
    with loaded(stages):
        found = mine(stages)
        assert [(one["index"], one["count"], one["state"]) for one in found] == [
            (0, 2, "running"),
            (1, 2, "running"),
        ]
        assert sorted(one["pid"] for one in found) == children()
        assert {one["parent"] for one in found} == {os.getpid()}
        assert all(one["resident"] > 0 for one in found)
        shown = CliRunner().invoke(command, ["status"])
        assert shown.exit_code == 0
        assert all(str(one["pid"]) in shown.output for one in found)
        os.kill(found[1]["pid"], signal.SIGSTOP)
        until(lambda: [one["state"] for one in mine(stages)][1:2] == ["stopped"])
    until(lambda: mine(stages) == [])


def test_what_is_not_a_stage_is_not_listed(tmp_path):
    """CLUSTER-50：看不懂的进程跳过；没有 ``/proc`` 的系统说看不到。"""
    words = ["python", "-m", "deepseek_export.cluster.stage"]
    for name, line in (("1", [*words, "{"]), ("2", ["python"]), ("3", words), ("x", words)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cmdline").write_bytes("\0".join([*line, ""]).encode())
        (tmp_path / name / "stat").write_text(f"{name} (python) S 1 1 1", encoding="utf-8")
    assert local_stages(tmp_path) == []
    assert local_stages(tmp_path / "none") is None


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:10001", "host:port", "127.0.0.1:99999999"]
)
def test_a_cluster_that_is_not_there(address):
    """CLUSTER-50：地址上没有 Ray、写得不对，马上说。"""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    error = refused("DSX-E754", join, address.format(port=port))
    assert "ray start --head" in error.todo


def test_one_that_does_not_answer(monkeypatch):
    """CLUSTER-50：有人听而不答，限时说清。"""
    gate = ray_cluster.threading.Event()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: gate.wait(30))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        error = refused("DSX-E754", lambda: join(f"{host}:{port}", seconds=0.1))
    gate.set()
    assert "0.1 秒" in error.what


def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """两台机器、一个 placement group、四个 stage、一个 Ray Serve 的应用。"""
    answers = {
        "stage-ab-0": {"node": "n1", "bundle": "/s/stage.0", "index": 0, "count": 2, "pid": 7, "ended": None},
        "stage-ab-1": {
            "node": "n2",
            "bundle": "/s/stage.1",
            "index": 1,
            "count": 2,
            "pid": 8,
            "ended": "被信号 9 终止",
        },
        "stage-cd-0": None,
        "stage-ef-0": ray.exceptions.RayActorError(),
        "stage-gh-0": {
            "node": "n1",
            "bundle": None,
            "index": None,
            "count": None,
            "pid": None,
            "ended": None,
        },
    }

    def get_actor(name: str, namespace: str) -> Any:
        if name == "stage-zz-0":
            raise ValueError
        return SimpleNamespace(describe=SimpleNamespace(remote=lambda: name))

    def get(name: str) -> Any:
        if isinstance(told := answers[name], Exception):
            raise told
        return told

    node = {"NodeID": "n1", "NodeManagerHostname": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}
    other = {**node, "NodeID": "n2", "NodeManagerHostname": "b", "Alive": False, "Resources": {}}
    fake = SimpleNamespace(
        nodes=lambda: [{**node, "Resources": {"CPU": 4.0, "memory": 2.0**30, "node:a": 1.0}}, other],
        available_resources=lambda: {"CPU": 1.0},
        get_actor=get_actor,
        wait=lambda asked, **_: ([one for one in asked if answers[one] is not None], []),
        get=get,
        exceptions=ray.exceptions,
    )
    group = {"placement_group_id": "p", "name": "dsx:s:ab", "state": "CREATED", "strategy": "PACK"}
    group |= {"bundles": {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}, "bundles_to_node_id": {0: "n1", 1: ""}}
    table = {"p": group, "q": {**group, "state": "REMOVED"}, "r": {**group, "name": "others"}}
    names = [{"name": name, "namespace": "dsx"} for name in [*answers, "stage-zz-0", "lease-1"]]
    names.append({"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"})
    model = SimpleNamespace(
        status=SimpleNamespace(value="HEALTHY"), message="", replica_states={"RUNNING": 2}
    )
    serving = {"dsx:m": SimpleNamespace(deployments={"model": model}), "x": SimpleNamespace(deployments={})}
    monkeypatch.setattr(status, "join", lambda _: fake)
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: names)
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: table)
    monkeypatch.setattr(ray.serve, "status", lambda: SimpleNamespace(applications=serving))


def test_what_ray_has(monkeypatch):
    """CLUSTER-50：Ray 上的机器、位置、stage、副本；结束了的、不答的、actor 没有了的，照实写着；别人的不列。"""
    fake_ray(monkeypatch)
    found = status.ray_status("auto")
    assert [(one["id"], one["alive"], one["resources"]) for one in found["nodes"]] == [
        ("n1", True, {"CPU": 4.0, "memory": 2.0**30}),
        ("n2", False, {}),
    ]
    assert [one["name"] for one in found["groups"]] == ["dsx:s:ab"]
    assert [one["node"] for one in found["groups"][0]["bundles"]] == ["n1", None]
    assert [(one["gang"], one["index"], one["state"]) for one in found["stages"]] == [
        ("ab", 0, "running"),
        ("ab", 1, "ended"),
        ("cd", 0, "silent"),
        ("ef", 0, "gone"),
        ("gh", 0, "starting"),
    ]
    (replica,) = found["replicas"]
    assert replica["application"] == "m"
    assert replica["states"] == {"RUNNING": 2}
    shown = CliRunner().invoke(command, ["status", "--ray", "auto"])
    assert shown.exit_code == 0
    for said in ("被信号 9 终止", "没有回答", "不在了", "还没有占到", "RUNNING 2", "1.00 GiB"):
        assert said in shown.output
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: [])
    monkeypatch.setattr(ray.util, "placement_group_table", dict)
    empty = CliRunner().invoke(command, ["status", "--ray", "auto"]).output
    assert all(said in empty for said in ("没有占着的位置", "没有 stage", "没有副本"))


def test_the_command_says_so_too(tmp_path):
    """CLUSTER-50：命令行上是三行与退出码 1，``--json`` 也有。"""
    done = dsx("cluster", "status", "--ray", "127.0.0.1:1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "DSX-E754"
