"""specs/cluster 的 CLUSTER-51：一池副本做批量；死了、停住了、起不来的。"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cli.sources import ExportOptions, bundle_of
from deepseek_export.cli.staging import check_replicas, replica_range, staged, stages_beside
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress
from deepseek_export.replicas import pool as pools
from deepseek_export.replicas.pool import ReplicaPool, Worker, WorkerLost
from deepseek_export.replicas.replica import Replica, ReplicaSpec
from deepseek_export.replicas.service import ReplicaService
from deepseek_export.serving import EngineSettings, batch
from deepseek_export.serving.batch import BatchReport, run_batch
from tests.contract.test_batch_contract import answers, line, written
from tests.engines import refused
from tests.integration.cli import dsx
from tests.serving_http import until

pytestmark = pytest.mark.contract


class Fake:
    """假的副本：记下做了什么；``die`` 之后就没有了，``freeze`` 之后不再回答。"""

    def __init__(self, index: int, trouble: DsxError | None = None, slow: bool = False) -> None:
        self.index, self.trouble, self.slow = index, trouble, slow
        self.done: list[str] = []
        self.stopped = threading.Event()
        self.dead = self.frozen = self.busy = False
        self._heard_at = time.monotonic()

    @property
    def heard_at(self) -> float:
        return self._heard_at

    def loading(self) -> bool:
        if self.trouble is not None:
            raise self.trouble
        return self.slow

    def alive(self) -> bool:
        if not self.frozen and not self.dead:
            self._heard_at = time.monotonic()
        return not self.dead

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        name = json.loads(body)["prompt"]
        for _ in range(3):
            await asyncio.sleep(0.001)
        while self.frozen and not self.stopped.is_set():
            await asyncio.sleep(0.001)
        if self.dead or self.stopped.is_set():
            raise WorkerLost
        if self.busy:
            return 503, b"{}"
        self.done.append(name)
        return 200, json.dumps({"said": name}).encode()

    def stop(self) -> None:
        self.stopped.set()


class Room:
    """起假的副本的地方。"""

    def __init__(self, make: Callable[[int, int], Fake] = lambda index, _: Fake(index)) -> None:
        self.made: list[Fake] = []
        self._make = make
        self.released = 0

    def __call__(self, index: int) -> Worker:
        self.made.append(self._make(index, len(self.made)))
        return self.made[-1]

    def release(self) -> None:
        self.released += 1

    def pool(self, count: int, start_s: float = 60.0) -> ReplicaPool:
        return ReplicaPool(self, count, start_s, self.release)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pools, "_TICK_S", 0.01)
    monkeypatch.setattr(batch, "_RETRY_S", 0.01)


def test_all_share_the_work_and_the_order_stays(tmp_path):
    """CLUSTER-51：几个副本都做，答案同序；用完都放掉。"""
    names = [f"r{number}" for number in range(60)]
    source, room = written(tmp_path, [line(name, prompt=name) for name in names]), Room()
    with room.pool(3) as pool:
        until(lambda: pool.ready == 3)
        report = run_batch(source, tmp_path / "out", pool.post, model="m", concurrency=6)
    assert report == BatchReport(60, 0, 0)
    assert [one["custom_id"] for one in answers(tmp_path / "out")] == names
    assert all(one.done for one in room.made)
    assert sorted(name for one in room.made for name in one.done) == sorted(names)
    assert all(one.stopped.is_set() for one in room.made)
    assert room.released == 1


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_a_lost_replica_is_started_again(tmp_path, monkeypatch, how):
    """CLUSTER-51：一个死了、停住了：手上的由别的重做，它重起；答案不丢不重。"""
    monkeypatch.setattr(pools, "SILENCE_S", 0.3)
    names = [f"r{number}" for number in range(200)]
    source, room = written(tmp_path, [line(name, prompt=name) for name in names]), Room()
    with room.pool(2) as pool:
        until(lambda: pool.ready == 2)

        async def call(path: str, body: bytes) -> tuple[int, bytes]:
            if json.loads(body)["prompt"] == "r50":
                setattr(room.made[0], how, True)
            return await pool.post(path, body)

        assert run_batch(source, tmp_path / "out", call, model="m", concurrency=4) == BatchReport(200, 0, 0)
        until(lambda: pool.ready == 2 and len(room.made) >= 3)
    assert [one["custom_id"] for one in answers(tmp_path / "out")] == names
    assert all(one["response"]["status_code"] == 200 for one in answers(tmp_path / "out"))
    assert room.made[0].stopped.is_set()


def test_a_busy_one_is_left_alone_for_a_while():
    """CLUSTER-51：答了 503 的先歇一会儿，交给别的。"""
    room = Room()
    with room.pool(2) as pool:
        until(lambda: pool.ready == 2)
        room.made[0].busy = True

        async def ask() -> list[int]:
            return [(await pool.post("/", b'{"prompt": "x"}'))[0] for _ in range(6)]

        assert sorted(asyncio.run(ask()))[:5] == [200] * 5


def test_one_that_cannot_load_says_why():
    """CLUSTER-51：起不来就说它说的原因，不一直等；加载时死了、太久，也说得清。"""
    bad = DsxError("DSX-E741", "缺了一个", "换一个目录")

    def ask(pool: ReplicaPool) -> None:
        asyncio.run(pool.post("/", b'{"prompt": "x"}'))

    with Room(lambda index, _: Fake(index, bad)).pool(2) as pool:
        refused("DSX-E741", ask, pool)
    with Room(lambda index, _: Fake(index, slow=True)).pool(1, start_s=0.05) as pool:
        assert "0.05 秒" in refused("DSX-E755", ask, pool).what

    def dying(index: int, _: int) -> Fake:
        made = Fake(index, slow=True)
        made.dead = True
        return made

    with Room(dying).pool(1) as pool:
        assert "加载时" in refused("DSX-E755", ask, pool).what


def test_it_gives_up_after_a_few_tries():
    """CLUSTER-51：起来过的重起几次都不成，就不再试，批量停在那里，可以接着做。"""
    room = Room(lambda index, made: Fake(index, DsxError("DSX-E744", "没有内存", "加内存") if made else None))
    with room.pool(1) as pool:
        until(lambda: pool.ready == 1)
        room.made[0].dead = True
        until(lambda: len(room.made) >= 2)
        refused("DSX-E744", lambda: asyncio.run(pool.post("/", b'{"prompt": "x"}')))
    assert 2 <= len(room.made) <= 5


def test_nobody_waits_when_nobody_watches():
    """CLUSTER-51：看着副本的线程自己出了错，或不再试了：停住的副本手上的请求也得到说法，不一直等。"""

    class Odd(Fake):
        def alive(self) -> bool:
            if self.dead:
                raise RuntimeError("想不到的事")
            return super().alive()

    def gives_up(index: int, made: int) -> Fake:
        return Fake(index, DsxError("DSX-E744", "没有内存", "加内存") if made >= 2 else None)

    for make, code in ((lambda index, _: Odd(index), "DSX-E755"), (gives_up, "DSX-E744")):
        room = Room(make)
        with room.pool(2) as pool:
            until(lambda pool=pool: pool.ready == 2)
            room.made[0].frozen = True

            async def ask(pool: ReplicaPool = pool, room: Room = room) -> None:
                waiting = asyncio.create_task(pool.post("/", b'{"prompt": "x"}'))
                await asyncio.sleep(0.05)  # 交到停住的那个手上
                room.made[1].dead = True
                assert (await asyncio.wait_for(waiting, 60))[0] == 503
                while True:  # 放掉的手上没有别的：接着问，就是为什么
                    await pool.post("/", b'{"prompt": "x"}')

            refused(code, lambda ask=ask: asyncio.run(ask()))
            assert all(one.stopped.is_set() for one in room.made)


def test_a_start_that_fails_leaves_nothing():
    """CLUSTER-51：起到一半不成，起好的放掉。"""

    def make(index: int, _: int) -> Fake:
        if index == 1:
            raise DsxError("DSX-E744", "没有位置", "加机器")
        return Fake(index)

    room = Room(make)
    refused("DSX-E744", room.pool, 2)
    assert room.made[0].stopped.is_set()
    assert room.released == 1


@pytest.mark.parametrize("text", ["", "0", "-1", "4-2", "1-", "x", "1-2-3", "1025", "1.5"])
def test_how_many_replicas(text):
    """CLUSTER-52：``--replicas`` 是个数或范围；没有 ``--ray`` 就拒绝。"""
    assert replica_range("2") == (2, 2)
    assert replica_range("1-4") == (1, 4)
    refused("DSX-E753", replica_range, text)
    refused("DSX-E753", check_replicas, 2, None, None, [])
    refused("DSX-E753", check_replicas, None, "auto", None, [Path("out")])
    check_replicas(None, None, None, [Path("out")])
    check_replicas(2, "auto", None, [Path("out")])
    check_replicas(None, "auto", "2", [Path("out")])


@pytest.mark.heavy
def test_without_ray_serve_it_says_how_to_install(bundle, monkeypatch):
    """CLUSTER-52：Ray Serve 的依赖没有装，用到才说。"""
    spec = ReplicaSpec(bundle, "m", EngineSettings(), ClusterSettings(ray="auto"))
    monkeypatch.setitem(sys.modules, "grpc", None)
    error = refused("DSX-E752", lambda: ReplicaService(spec, (1, 1), ("127.0.0.1", 0)))
    assert "grpc" in error.what
    assert "deepseek-export[ray]" in error.todo


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("code", "more"),
    [
        ("DSX-E753", ["--replicas", "2"]),
        ("DSX-E753", ["--ray", "auto"]),
        ("DSX-E753", ["--ray", "auto", "--replicas", "4-2"]),
        ("DSX-E753", ["--ray", "auto", "--replicas", "2", "--slot-save-path", "."]),
        ("DSX-E753", ["--ray", "auto", "--replicas", "2", "--model", "b=OUT"]),
        ("DSX-E756", ["--ray", "auto", "--tls-cert", "a.pem"]),
        ("DSX-E754", ["--ray", "127.0.0.1:1", "--replicas", "2", "--port", "0"]),
    ],
)
def test_what_does_not_go_together(bundle, code, more):
    """CLUSTER-52、CLUSTER-53：``--replicas`` 与别的选项合不来的，加载之前就说。"""
    done = dsx("serve", bundle, *more)
    assert done.returncode == 1
    assert code in done.stderr


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    return deepseek_export.export(CHECKPOINT, folder / "out", "mla").path


@pytest.mark.heavy
def test_stages_are_cut_beside_the_bundle(bundle):
    """CLUSTER-52：``--stages`` 切在 OUT 旁边，第二次直接用；已经切开的要相符；由别的切成的不用。"""
    made = staged(bundle, "2", Progress())
    assert made == stages_beside(bundle, "2") == bundle.with_name("out.stages-2")
    before = (made / "stages.json").stat().st_mtime_ns
    assert staged(bundle, "2", Progress()) == made
    assert (made / "stages.json").stat().st_mtime_ns == before
    assert staged(made, "2", Progress()) == made
    check_replicas(None, "auto", None, [bundle, made])
    assert staged(made, None, Progress()) == made
    nothing = ExportOptions(None, None, None, None, ())
    assert bundle_of(made, nothing, False, Progress()) == made  # 有 config.json，可不是检查点
    refused("DSX-E753", staged, made, "3", Progress())
    other = deepseek_export.export(CHECKPOINT, bundle.with_name("other"), "mla", target="ort-cpu").path
    made.rename(stages_beside(other, "2"))
    assert "--overwrite" in refused("DSX-E753", staged, other, "2", Progress()).todo


@pytest.mark.heavy
def test_what_a_replica_asks_for(bundle):
    """CLUSTER-16、CLUSTER-51：要的 CPU 与放得下权重的内存；切开了的，副本一份、每个 stage 一份；在 GPU 上跑的另要 GPU。"""
    stages = deepseek_export.split(bundle, bundle.with_name("three"), 3)

    def spec(path: Path, backend: str = "ort") -> ReplicaSpec:
        return ReplicaSpec(path, "m", EngineSettings(), ClusterSettings(cpus=2), backend=backend)

    (whole,) = spec(bundle).resources
    assert whole["CPU"] == 2
    own, *each = spec(stages.path).resources
    assert own == {"CPU": 1.0}
    assert [one["CPU"] for one in each] == [2.0] * 3
    sizes = [item.weight_bytes for item in StageSet.open(stages.path).record.stages]
    assert [one["memory"] for one in each] == sizes
    assert max(sizes) < whole["memory"] <= sum(sizes)
    assert all(one["GPU"] == 1 for one in spec(stages.path, "trt").resources[1:])
    assert spec(bundle, "trt").resources[0]["GPU"] == 1


@pytest.mark.heavy
def test_a_replica_answers_and_says_what_is_wrong(bundle):
    """CLUSTER-51：副本不在 Ray 里也起得来：切开了的与没切的同样的 token；断了的自己好，停了的要换掉。"""
    from deepseek_export.serving.http.inside import post

    body = json.dumps({"prompt": [5, 9, 23], "max_tokens": 8, "temperature": 0, "ignore_eos": True}).encode()
    said = []
    for path in (bundle, deepseek_export.split(bundle, bundle.with_name("two"), 2).path):
        replica = Replica(ReplicaSpec(path, "m", EngineSettings(slots=2), ClusterSettings(), 1), inside=False)
        try:
            status, answer = asyncio.run(post(replica.app, "/v1/completions", body))
            assert status == 200
            said.append(json.loads(answer)["choices"][0]["text"])
            assert replica.trouble() is None
        finally:
            replica.close()
        assert replica.trouble() is not None
    assert said[0] == said[1]
