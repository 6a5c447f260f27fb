"""specs/cluster 的 CLUSTER-50：看有什么在跑，连不上 Ray 限时说清。"""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export.cli.cluster import command
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
    import ray

    from deepseek_export.cluster import ray_cluster

    gate = ray_cluster.threading.Event()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: gate.wait(30))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        error = refused("DSX-E754", lambda: join(f"{host}:{port}", seconds=0.1))
    gate.set()
    assert "0.1 秒" in error.what


def test_the_command_says_so_too(tmp_path):
    """CLUSTER-50：命令行上是三行与退出码 1，``--json`` 也有。"""
    done = dsx("cluster", "status", "--ray", "127.0.0.1:1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "DSX-E754"
