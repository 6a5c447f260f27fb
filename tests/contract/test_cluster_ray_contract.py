"""specs/cluster 的 CLUSTER-16：几个节点的 Ray，都在本机上。"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import deepseek_export
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.status import ray_status
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from tests.contract.test_cluster_tls_contract import issued
from tests.engines import refused
from tests.serving_http import until
from tests.stages import alive, write_five

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPT = [5, 9, 23, 100, 7]
SETTINGS = ClusterSettings(ray="auto", strategy="spread", start_s=120.0, silence_s=3.0, retry_s=0.2)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> StageSet:
    folder = tmp_path_factory.mktemp("ray")
    bundle = deepseek_export.export(write_five(folder / "ck"), folder / "out", "full").path
    return deepseek_export.split(bundle, folder / "stages", 3)


def test_without_ray_it_says_how_to_install(stages, monkeypatch):
    """CLUSTER-16：没有装 Ray，用到才说；本机上起用不着它。"""
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused("DSX-E751", lambda: deepseek_export.load(stages.path, 1, cluster=SETTINGS))
    assert "deepseek-export[ray]" in error.todo
    deepseek_export.load(stages.path, 1).close()
    refused("DSX-E740", lambda: ClusterSettings(strategy="far"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """三个节点，各一个 CPU。"""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def groups() -> list[dict[str, Any]]:
    """dsx 占着的 placement group。"""
    return [group for group in ray_status("auto")["groups"] if group["name"].startswith("dsx:")]


@contextmanager
def placed(stages: StageSet) -> Iterator[tuple[CompiledModel, list[int]]]:
    """放到 Ray 上的模型与各 stage 的进程号；退出时看什么也没有留下。"""
    import ray

    model = deepseek_export.load(stages.path, 1, cluster=SETTINGS)
    try:
        yield model, [stage["pid"] for stage in model.session.runner.stages]  # type: ignore[attr-defined]
        last = [stage["pid"] for stage in model.session.runner.stages]  # type: ignore[attr-defined]
    finally:
        model.close()
    until(lambda: alive(last) == [])
    until(lambda: ray.available_resources().get("CPU") == 3.0, 30)


@pytest.fixture(scope="module")
def want(stages: StageSet) -> list[int]:
    model = deepseek_export.load(stages.path.with_name("out"), 1)
    return model.generate([PROMPT], 60, speculative=False, ignore_eos=True).token_ids[0]


def tokens(model: CompiledModel, speculative: bool = False) -> list[int]:
    return model.generate([PROMPT], 60, speculative=speculative, ignore_eos=True).token_ids[0]


@pytest.mark.slow
def test_stages_on_three_nodes(nodes, stages, want):
    """CLUSTER-16：分散在三个节点上，普通的与投机的都与一个进程逐个 token 相同；没有留下什么。"""
    from ray.util import placement_group_table

    with placed(stages) as (model, pids):
        found = ray_status("auto")
        assert [one["index"] for one in found["stages"]] == [0, 1, 2]
        assert [one["pid"] for one in found["stages"]] == pids
        assert len({one["node"] for one in found["stages"]}) == 3
        assert {one["state"] for one in found["stages"]} == {"running"}
        assert [len(group["bundles"]) for group in found["groups"]] == [3]
        assert all(bundle["resources"]["memory"] > 0 for bundle in found["groups"][0]["bundles"])
        (table,) = (one for one in placement_group_table().values() if one["state"] == "CREATED")
        assert len(set(table["bundles_to_node_id"].values())) == 3
        assert tokens(model) == want
        assert tokens(model, speculative=True) == want


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("what", ["stage", "actor"])
def test_killed_and_frozen(nodes, stages, want, what, number):
    """CLUSTER-16：stage 与 actor 被杀、被停住：算着的得到可以再试的错误，自己恢复，同样的 token；停住的 actor 不碍事。"""
    with placed(stages) as (model, mine):
        victim = mine[1]
        if what == "actor":
            victim = int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1])
        given: list[int] = []

        def strike(row: int, token: int) -> None:
            given.append(token)
            if len(given) == 3:
                os.kill(victim, number)

        def run() -> None:
            model.generate([PROMPT], 400, speculative=False, ignore_eos=True, on_token=strike)

        if (what, number) == ("actor", signal.SIGSTOP):
            run()
        else:
            with pytest.raises(DsxError, match=r"DSX-E74[237]"):
                run()
        until(lambda: model.session.runner.failure is None, 90)
        assert tokens(model) == want
        if (what, number) == ("actor", signal.SIGSTOP):
            os.kill(victim, signal.SIGCONT)
        else:
            assert alive(mine[1:2]) == []


@pytest.mark.slow
def test_too_few_cpus_is_told_in_time(nodes, stages):
    """CLUSTER-16：占不到资源，限时说清，占了一半的放开。"""
    import ray

    settings = ClusterSettings(ray="auto", start_s=3.0, cpus=2)
    error = refused("DSX-E744", lambda: deepseek_export.load(stages.path, 1, cluster=settings))
    assert "CPU" in error.what
    until(lambda: ray.available_resources().get("CPU") == 3.0, 30)


@pytest.mark.slow
def test_encrypted_between_nodes(nodes, stages, want, tmp_path):
    """CLUSTER-53：给了证书的，stage 之间的信道都加密，token 相同；stage 拿到的证书不是那个 CA 签的，起不来，说得清。"""
    import ray
    import trustme

    ours = trustme.CA()
    files = issued(tmp_path, ours, "node.example")
    settings = ClusterSettings(**{**vars(SETTINGS), "tls": files})
    model = deepseek_export.load(stages.path, 1, cluster=settings)
    try:
        assert tokens(model) == want
    finally:
        model.close()
    trustme.CA().cert_pem.write_to_path(files.ca)
    error = refused("DSX-E749", lambda: deepseek_export.load(stages.path, 1, cluster=settings))
    assert "TLS" in error.what
    until(lambda: ray.available_resources().get("CPU") == 3.0, 30)


@pytest.mark.slow
def test_a_node_that_comes_later(nodes, stages, want):
    """CLUSTER-16：先起模型，机器后来才加入：等到它。"""
    import ray

    one = deepseek_export.split(stages.path.with_name("out"), stages.path.with_name("one"), 1)
    settings = ClusterSettings(**{**vars(SETTINGS), "cpus": 3})  # 现有的三个节点都放不下
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(deepseek_export.load, one.path, 1, cluster=settings)
        until(lambda: any(group["state"] == "PENDING" for group in groups()), 60)
        late = nodes.add_node(num_cpus=3, object_store_memory=80 << 20)
        model = loading.result(120)
    try:
        assert tokens(model) == want
    finally:
        model.close()
        nodes.remove_node(late)
    until(lambda: ray.available_resources().get("CPU") == 3.0, 60)
