"""specs/cluster 的 CLUSTER-52：Ray Serve 上的入口与副本；这里没有起 Ray，它的那一头是假的。"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
import ray.serve
import ray.util

import deepseek_export
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.replicas import deployment
from deepseek_export.replicas import service as services
from deepseek_export.replicas.deployment import FrontSpec, Handed, ModelReplica, application
from deepseek_export.replicas.replica import ReplicaSpec
from deepseek_export.replicas.service import ReplicaService
from deepseek_export.serving import EngineSettings
from deepseek_export.serving.http.affinity import Hint
from deepseek_export.serving.http.front import Message, ReplicaLost, create_front
from deepseek_export.serving.http.keys import KeyRing
from tests.engines import refused
from tests.serving_http import events

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

BODY = {"prompt": "床前明月光", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas-serve")
    return deepseek_export.export(CHECKPOINT, folder / "out", "mla").path


def spec_of(bundle: Path, **cluster: Any) -> ReplicaSpec:
    return ReplicaSpec(bundle, "demo", EngineSettings(slots=2), ClusterSettings(ray="auto", **cluster), 1)


@pytest.fixture(scope="module", autouse=True)
def _logger() -> Iterator[None]:
    """副本在自己的进程里把日志写到 stderr；这里用完去掉。"""
    logger = logging.getLogger("dsx.serve")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="module")
def replica(bundle: Path) -> Iterator[ModelReplica]:
    """副本的类，直接在这个进程里。"""
    made = ModelReplica(spec_of(bundle))
    yield made
    made.__del__()


class Handle:
    """假的句柄：就在这个进程里做。"""

    def __init__(self, replica: ModelReplica, broken: Exception | None = None) -> None:
        self._replica, self._broken = replica, broken
        self.cancelled = 0

    def options(self, **given: Any) -> Handle:
        assert given == {"stream": True, "method_name": "ask"}
        return self

    def remote(self, *given: Any) -> Any:
        async def run() -> AsyncGenerator[Message, None]:
            if self._broken is not None:
                raise self._broken
            async for message in self._replica.ask(*given):
                yield message

        def cancel() -> None:
            self.cancelled += 1

        return _Answer(run(), cancel)


class _Answer:
    def __init__(self, making: AsyncGenerator[Message, None], cancel: Callable[[], None]) -> None:
        self._making, self.cancel = making, cancel

    def __aiter__(self) -> AsyncGenerator[Message, None]:
        return self._making


def sent(
    handle: Handle, method: str = "POST", path: str = "/v1/completions", **options: Any
) -> httpx.Response:
    app = create_front(Handed(handle))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    monkeypatch.setattr(ray.serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="r1"))


def test_the_replica_answers_as_dsx_serve_does(bundle, replica):
    """CLUSTER-52：经过入口与副本的回答，整个的与流式的，都与模型自己的相同。"""
    with deepseek_export.load(bundle, 1) as model:
        told = model.generate(BODY["prompt"], 6, ignore_eos=True).text
    assert told is not None
    handle = Handle(replica)
    whole = sent(handle, json=BODY)
    assert whole.json()["choices"][0]["text"] == told[0]
    assert whole.headers["x-request-id"]
    pieces = events(sent(handle, json={**BODY, "stream": True}).text)
    assert "".join(one["choices"][0]["text"] for one in pieces) == told[0]
    assert sent(handle, "GET", "/health").json() == {"status": "ok"}
    assert sent(handle, "GET", "/v1/models").json()["data"][0]["id"] == "demo"
    assert sent(handle, json={"prompt": []}).status_code == 400
    assert 'replica="r1"' in sent(handle, "GET", "/metrics").text
    assert handle.cancelled >= 5
    replica.check_health()


def test_one_that_was_tried_does_nothing(replica):
    """CLUSTER-52：试过的副本只报名字，不再做一遍。"""

    async def ask() -> list[Message]:
        return [message async for message in replica.ask(Hint("", ("r1",)), {"path": "/"}, b"")]

    assert asyncio.run(ask()) == [{"type": "replica", "name": "r1"}]


def test_a_dead_actor_is_a_lost_replica(replica):
    """CLUSTER-52：Ray 说副本没有了，入口换一个；只有它就是可以再试的 503。"""
    handle = Handle(replica, ray.exceptions.RayActorError())
    assert sent(handle, json=BODY).status_code == 503

    async def ask() -> None:
        async for _ in Handed(handle).ask(Hint(), {}, b""):
            pass

    with pytest.raises(ReplicaLost):
        asyncio.run(ask())


def test_a_closed_engine_is_replaced(bundle):
    """CLUSTER-52：引擎停了的副本，Ray Serve 问的时候说得出来。"""
    made = ModelReplica(spec_of(bundle))
    made.check_health()
    made.__del__()
    with pytest.raises(RuntimeError):
        made.check_health()


@pytest.mark.parametrize("replicas", [(2, 2), (1, 4)])
def test_what_is_asked_of_ray_serve(bundle, monkeypatch, replicas):
    """CLUSTER-52：几个副本、伸缩的范围、路由、每个副本的位置：都照给的。"""
    asked: dict[str, dict[str, Any]] = {}

    def record(name: str, **options: Any) -> Callable[[Any], Any]:
        asked[name] = options
        made = SimpleNamespace(bind=lambda *given: given)
        made.options = lambda **more: asked[name].update(more) or made
        return lambda kind: made

    monkeypatch.setattr(ray.serve, "deployment", record)
    stages = deepseek_export.split(bundle, bundle.with_name(f"stages-{replicas[1]}"), 2)
    front = FrontSpec("dsx:demo", "lease", KeyRing())
    application(spec_of(stages.path, strategy="spread"), replicas, front)
    model = asked["model"]
    assert [one["CPU"] for one in model["placement_group_bundles"]] == [1, 1, 1]
    assert model["placement_group_strategy"] == "SPREAD"
    assert model["request_router_config"]["request_router_kwargs"] == {"full": 2}
    assert model["max_constructor_retry_count"] == 3
    if replicas == (2, 2):
        assert model["num_replicas"] == 2
        assert "autoscaling_config" not in model
    else:
        scaling = model["autoscaling_config"]
        assert (scaling.min_replicas, scaling.max_replicas) == replicas
        assert "num_replicas" not in model
    application(spec_of(bundle), replicas, front)
    assert "placement_group_bundles" not in asked["model"]
    assert asked["model"]["ray_actor_options"]["memory"] > 0
    assert asked["front"]["ray_actor_options"] == {"num_cpus": 0}


class Serve:
    """假的 Ray Serve：``states`` 是依次看到的状态与话。"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: tuple[str | None, str]) -> None:
        self.states = list(states)
        self.started: dict[str, Any] = {}
        self.stopped = 0
        self.actors: list[dict[str, str]] = []
        remote = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None))
        monkeypatch.setattr(services, "join", lambda *_: SimpleNamespace(remote=lambda _: remote))
        monkeypatch.setattr(services, "_POLL_S", 0.001)
        monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: self.actors)
        monkeypatch.setattr(ray.serve, "start", lambda **given: self.started.update(given))
        monkeypatch.setattr(ray.serve, "run_many", lambda *_, **__: None)
        monkeypatch.setattr(ray.serve, "status", self.status)
        monkeypatch.setattr(ray.serve, "shutdown", self.shutdown)

    def status(self) -> Any:
        state, told = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            return SimpleNamespace(applications={})
        found = SimpleNamespace(status=SimpleNamespace(value=state), message=told, deployments={})
        return SimpleNamespace(applications={"dsx:demo": found})

    def shutdown(self) -> None:
        self.stopped += 1


def never(seconds: float) -> bool:
    return False


def test_started_watched_and_stopped(bundle, monkeypatch, caplog):
    """CLUSTER-52：起好了才说就绪；话变了写进日志；被别人停下说得清；停下就是停下 Ray Serve。"""
    fake = Serve(
        monkeypatch,
        ("DEPLOYING", ""),
        ("DEPLOYING", "等资源"),
        ("RUNNING", ""),
        ("RUNNING", "慢"),
        (None, ""),
    )
    service = ReplicaService(spec_of(bundle), (1, 1), ("127.0.0.1", 8123))
    assert service.start(never)
    assert fake.started == {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": 8123}}
    assert "被别人停下" in refused("DSX-E755", service.watch, never).what
    service.close()
    assert fake.stopped == 1
    assert [record.getMessage() for record in caplog.records if "Ray Serve" in record.getMessage()] == [
        "Ray Serve：等资源",
        "Ray Serve：慢",
    ]


def test_one_that_cannot_start_says_why(bundle, monkeypatch):
    """CLUSTER-52：起不来说它自己的错误，不抄 traceback；太久、要停了，都不再等；外面的地址各台都听。"""
    told = f"Traceback (most recent call last):\n  File\n{DsxError('DSX-E406', 'x 有 1 字节', '重新拷贝')}\n"
    fake = Serve(monkeypatch, ("DEPLOY_FAILED", told))
    start = ReplicaService(spec_of(bundle), (1, 1), ("0.0.0.0", 8000)).start
    assert refused("DSX-E755", start, never).what == "DSX-E406 bundle 的文件与 manifest 不符：x 有 1 字节"
    assert fake.started["proxy_location"] == "EveryNode"
    Serve(monkeypatch, ("DEPLOYING", "等资源"))
    service = ReplicaService(spec_of(bundle, start_s=0.01), (1, 1), ("127.0.0.1", 8000))
    assert "等资源" in refused("DSX-E755", service.start, never).what
    assert not ReplicaService(spec_of(bundle), (1, 1), ("127.0.0.1", 8000)).start(lambda _: True)


def test_another_ray_serve_is_left_alone(bundle, monkeypatch):
    """CLUSTER-52：这个 Ray 上已经有 Ray Serve：拒绝，不碰它。"""
    fake = Serve(monkeypatch, ("RUNNING", ""))
    fake.actors = [{"namespace": "serve", "name": "SERVE_CONTROLLER_ACTOR"}]
    refused("DSX-E753", lambda: ReplicaService(spec_of(bundle), (1, 1), ("127.0.0.1", 8000)))
    assert fake.stopped == 0


def test_the_application_goes_when_dsx_does(monkeypatch):
    """CLUSTER-52：握着的 actor 没有了，入口停下 Ray Serve；问不到就再问。"""
    asked: list[str] = []
    ended = deployment.threading.Event()

    def get_actor(name: str, namespace: str) -> None:
        asked.append(name)
        if len(asked) == 2:
            raise ray.exceptions.RayError
        if len(asked) == 4:
            raise ValueError

    monkeypatch.setattr(deployment, "_LEASE_S", 0.001)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray.serve, "shutdown", ended.set)
    deployment.Leased(FrontSpec("dsx:demo", "lease-1", KeyRing()), None)
    assert ended.wait(20)
    assert asked == ["lease-1"] * 4
