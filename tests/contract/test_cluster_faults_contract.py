"""specs/cluster：哪里断了都有回答，整套自己重起，同一个请求得到同样的 token，什么也不留下。"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import numpy as np
import pytest

import deepseek_export
from deepseek_export.backend import backend_named
from deepseek_export.backend.base import CachesLost
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.gang import Gang, Member, Started
from deepseek_export.cluster.local import LocalLauncher
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.wire import Frame
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.serving import Engine, EngineSettings, Request
from perf.workload.faulty import FaultyEdges
from tests.engines import refused
from tests.integration.cli import environment
from tests.serving_http import Running, opened, until
from tests.stages import alive, children, write_five

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

#: 规格里说的：断了之后，至多多少秒每个在等的都有回答。这里 silence_s 取 2。
BOUND_S = 20
SETTINGS = ClusterSettings(silence_s=2.0, start_s=120.0, step_s=60.0, retry_s=0.1)
PROMPT = [5, 9, 23, 100, 7, 31, 8, 44] * 40
RETRY = {"DSX-E742", "DSX-E743", "DSX-E747"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> StageSet:
    folder = tmp_path_factory.mktemp("faults")
    bundle = deepseek_export.export(write_five(folder / "ck"), folder / "out", "full").path
    return deepseek_export.split(bundle, folder / "stages", 3)


@pytest.fixture(scope="module")
def want(stages: StageSet) -> list[int]:
    """没有出事的时候，这个请求的 token。"""
    model = deepseek_export.load(stages.path.with_name("out"), 1)
    return model.generate([PROMPT], 100, speculative=False, ignore_eos=True).token_ids[0]


@contextmanager
def running(
    stages: StageSet, faulty: FaultyEdges | None = None, **options: int
) -> Iterator[tuple[CompiledModel, Engine]]:
    """在一套 stage 上开着的引擎；退出时看什么也没有留下。"""
    before, shared = set(children()), set(os.listdir("/dev/shm"))
    link = socket.socketpair if faulty is None else faulty.link
    launcher = LocalLauncher(stages.directories, threads=1, link=link)
    backend = PipelineBackend(stages, backend_named("ort"), SETTINGS, launcher)
    model = CompiledModel(stages.bundle, 1, backend)
    try:
        with model.engine(EngineSettings(slots=2, prefill_tokens=8, **options)) as engine:
            yield model, engine
            engine.close(drain=False)
    finally:
        model.close()
    assert set(children()) <= before
    assert set(os.listdir("/dev/shm")) == shared


def submit(engine: Engine, budget: int = 100) -> Request:
    return engine.submit(PROMPT, max_new_tokens=budget, ignore_eos=True)


def in_prefill(engine: Engine, request: Request) -> bool:
    return engine.stats.prefill_calls >= 3


def in_decode(engine: Engine, request: Request) -> bool:
    return len(request.token_ids) >= 5


def outcome(request: Request) -> str:
    """等到结束：错误码，或 ``ok``。"""
    try:
        request.result(BOUND_S)
    except DsxError as error:
        return error.code
    return "ok"


def pids(model: CompiledModel) -> list[int]:
    return children()


#: 常跑的几种；其余的组合是 slow。
_OFTEN = {
    (0, signal.SIGSTOP, in_decode),
    (1, signal.SIGKILL, in_prefill),
    (1, signal.SIGSTOP, in_prefill),
    (2, signal.SIGKILL, in_decode),
}


@pytest.mark.parametrize(
    ("stage", "number", "phase"),
    [
        pytest.param(*case, marks=() if case in _OFTEN else pytest.mark.slow)
        for case in itertools.product(range(3), (signal.SIGKILL, signal.SIGSTOP), (in_prefill, in_decode))
    ],
)
def test_a_dead_or_frozen_stage(stages, want, stage, number, phase):
    """CLUSTER-8、CLUSTER-9：每个 stage，杀掉与停住，算提示词时与生成时：在等的都有回答，健康状况先变坏再变好，重来得到同样的 token。"""
    with running(stages) as (model, engine):
        assert submit(engine).result().token_ids == want
        request = engine.submit([*PROMPT[::-1]], max_new_tokens=150, ignore_eos=True)
        base = engine.stats.prefill_calls
        queued = [submit(engine) for _ in range(3)]
        until(
            lambda: (
                engine.stats.prefill_calls >= base + 3 if phase is in_prefill else in_decode(engine, request)
            )
        )
        old = pids(model)
        os.kill(old[stage], number)
        until(lambda: not engine.healthy, BOUND_S)
        assert {outcome(one) for one in (request, *queued)} <= {*RETRY, "ok"}
        assert outcome(request) in RETRY
        until(lambda: engine.healthy, 60)
        assert submit(engine).result(BOUND_S).token_ids == want
        assert submit(engine).result(BOUND_S).token_ids == want  # 现成的前缀是新的那一套里的
        assert alive(old) == []
        until(lambda: engine.stats.running == engine.stats.waiting == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_lost_while_idle(stages, want, number, caplog):
    """CLUSTER-8：没有请求的时候断了，也看得出来、自己恢复，日志里有；留着的前缀不会被当成还在。"""
    with running(stages) as (model, engine):
        assert submit(engine).result().token_ids == want
        os.kill(pids(model)[1], number)
        until(lambda: not engine.healthy, BOUND_S)
        assert engine.failure.code in RETRY
        until(lambda: engine.healthy, 60)
        again = submit(engine).result(BOUND_S)
        assert again.token_ids == want
        assert again.cached_tokens == 0
    told = [record.getMessage() for record in caplog.records if record.name == "dsx.serve.cluster"]
    assert "stage 1" in told[0]
    assert told[1] == "整套 stage 又起来了"
    assert len(told) == 2


#: 常跑的几种；其余的组合是 slow。
_OFTEN_EDGES = {(0, "corrupt", in_decode), (1, "hold", in_decode), (3, "cut", in_prefill)}


@pytest.mark.parametrize(
    ("edge", "mode", "phase"),
    [
        pytest.param(*case, marks=() if case in _OFTEN_EDGES else pytest.mark.slow)
        for case in itertools.product(range(4), ("cut", "hold", "corrupt"), (in_prefill, in_decode))
    ],
)
def test_a_broken_channel(stages, want, edge, mode, phase):
    """CLUSTER-8、CLUSTER-9：信道断了、不递了、递坏了，每条边、算提示词时与生成时都一样：有回答，重起之后同样的 token。"""
    faulty = FaultyEdges()
    with running(stages, faulty) as (_, engine):
        request = submit(engine)
        until(lambda: phase(engine, request))
        faulty.modes[edge] = mode
        assert outcome(request) in RETRY
        faulty.modes.clear()
        until(lambda: engine.healthy, 60)
        assert submit(engine).result(BOUND_S).token_ids == want


def test_a_slow_channel_is_only_slow(stages, want):
    """CLUSTER-8：慢不是断：每条边都慢，答案照样对，没有重起。"""
    faulty = FaultyEdges()
    with running(stages, faulty) as (model, engine):
        faulty.modes = dict.fromkeys(range(4), "slow")
        assert submit(engine, 20).result().token_ids == want[:20]
        assert model.session.runner.generation == 1


def test_a_generator_says_it_too(stages, want):
    """CLUSTER-8：不经过引擎，生成的时候断了，抛的错误写着是哪个进程；再生成就好。"""
    with running(stages) as (_, engine):
        engine.close()
        model = CompiledModel(
            stages.bundle, 1, PipelineBackend(stages, backend_named("ort"), SETTINGS), speculative_floor=False
        )
        mine = children()[-3:]

        def kill_once(row: int, token: int) -> None:
            if alive(mine) == mine:
                os.kill(mine[1], signal.SIGKILL)

        with pytest.raises(DsxError, match="DSX-E742") as caught:
            model.generate([PROMPT], 100, ignore_eos=True, on_token=kill_once)
        assert "stage 1" in caught.value.what
        until(lambda: model.session.runner.failure is None, 60)
        assert model.generate([PROMPT], 100, ignore_eos=True).token_ids[0] == want
        model.close()


DRIVER = """
import sys, threading
import deepseek_export as dsx
from deepseek_export.model import CompiledModel
from deepseek_export.backend import backend_named
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.settings import ClusterSettings
from tests.stages import children

stages = StageSet.open(sys.argv[1])
settings = ClusterSettings(silence_s=2.0)
model = CompiledModel(stages.bundle, 1, PipelineBackend(stages, backend_named("ort"), settings))
print(*children(), flush=True)
prompt, new_tokens = ([5, 9, 23] * 150, 1) if sys.argv[2] == "prefill" else ([5, 9, 23], 400)
while True:
    model.generate([prompt], new_tokens, ignore_eos=True)
"""


@pytest.mark.parametrize(
    ("number", "frozen", "phase"),
    [
        (signal.SIGKILL, 1, "decode"),
        (signal.SIGSTOP, None, "decode"),
        pytest.param(signal.SIGKILL, None, "decode", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, None, "decode", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, "decode", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, None, "prefill", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, None, "prefill", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, "prefill", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, "prefill", marks=pytest.mark.slow),
    ],
)
def test_a_dead_or_frozen_driver_leaves_nothing(stages, number, frozen, phase):
    """CLUSTER-10：发起的一端被杀、被停住，算提示词时与生成时，stage 都结束，哪怕其中一个自己也停着。"""
    command = [sys.executable, "-c", DRIVER, str(stages.path), phase]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert driver.stdout is not None
        mine = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(mine) == 3
        if frozen is not None:
            os.kill(mine[frozen], signal.SIGSTOP)
        driver.send_signal(number)
        until(lambda: alive(mine) == [], BOUND_S)
    finally:
        driver.kill()
        driver.wait()


def test_clients_get_a_retryable_answer(tmp_path):
    """CLUSTER-8：经过 HTTP：503 带 Retry-After，健康检查变坏再变好，之后照常；答案里没有进程号。"""

    bundle = deepseek_export.export(CHECKPOINT, tmp_path / "out", "mla").path
    stages = deepseek_export.split(bundle, tmp_path / "stages", 2)

    def load():
        model = CompiledModel(stages.bundle, 1, PipelineBackend(stages, backend_named("ort"), SETTINGS))
        kept.append(model)
        return opened(model)

    kept: list[CompiledModel] = []
    with Running(load) as server:
        body = {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        answers: list[httpx.Response] = []
        ask = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        ask.start()
        until(lambda: server.engine.stats.generated_tokens > 5)
        os.kill(children()[-1], signal.SIGSTOP)
        until(lambda: server.get("/health").status_code == 503, BOUND_S)
        ask.join(BOUND_S)
        assert [one.status_code for one in answers] == [503]
        assert answers[0].headers["Retry-After"]
        assert answers[0].json()["error"]["code"] in RETRY
        assert "进程" not in answers[0].text
        until(lambda: server.get("/health").status_code == 200, 60)
        assert server.post("/v1/completions", {**body, "max_tokens": 4}).status_code == 200
    kept[0].close()


def test_caches_of_a_lost_set_say_so_once(stages):
    """CLUSTER-9：断之前分配的缓存，重起之后说一次丢了，再用就是新分配的；存下的一行也随它丢了。"""
    with running(stages) as (model, engine):
        engine.close()
        session = model.session
        caches = session.new_caches(2)
        saved = caches.save_row(0, 4)
        generation = session.runner.generation
        os.kill(pids(model)[0], signal.SIGKILL)
        until(lambda: session.runner.generation > generation, BOUND_S)
        assert session.runner.failure is not None
        until(lambda: session.runner.failure is None, 60)
        with pytest.raises(CachesLost, match="DSX-E747"):
            caches.clear_row(0)
        caches.clear_row(0)
        assert not any(array.any() for array in caches.save_row(1, 4).values())
        with pytest.raises(CachesLost):
            dict(saved)


def test_a_call_too_large_or_unknown_breaks_nothing(stages, want):
    """CLUSTER-6、CLUSTER-8：过不了信道的一次调用、不认得的消息，只有它失败，整套照常。"""
    gang = Gang(LocalLauncher(stages.directories, threads=1), SETTINGS)
    big = np.broadcast_to(np.zeros(1, np.float32), (1 << 29,))
    refused("DSX-E745", lambda: gang.call([Frame({"op": "restore", "caches": 1}, {"x": big})]))
    error = refused("DSX-E745", lambda: gang.call([Frame({"op": "__init__"})]))
    assert "__init__" in error.what
    assert gang.generation == 1
    assert len(gang.call([Frame({"op": "hello", "stages": []})] * 3)) == 3
    gang.close()


def test_the_watcher_outlives_what_it_watches(stages):
    """CLUSTER-9：问一个 stage 怎样了、停它都出了想不到的错：当它断了，别的照样停，整套照样重来。"""
    odd = threading.Event()

    class Odd:
        def __init__(self, member: Member) -> None:
            self._member = member

        @property
        def ended(self) -> str | None:
            if odd.is_set():
                raise RuntimeError("问不了")
            return self._member.ended

        def kill(self) -> None:
            self._member.kill()
            if odd.is_set():
                odd.clear()
                raise RuntimeError("停不下")

    class Launch:
        def start(self, settings: ClusterSettings) -> Started:
            started = LocalLauncher(stages.directories, threads=1).start(settings)
            return replace(started, members=tuple(map(Odd, started.members)))

    before = set(children())
    gang = Gang(Launch(), SETTINGS)
    odd.set()
    until(lambda: gang.generation == 2 and gang.failure is None, 60)
    assert len(gang.call([Frame({"op": "hello", "stages": []})])) == 1
    gang.close()
    assert set(children()) <= before


def test_a_start_has_a_limit(stages):
    """CLUSTER-8：加载也有上限；超过了、进程加载时就死了，都说清，没有留下进程。"""
    before = set(children())
    launcher = LocalLauncher(stages.directories, threads=1)
    backend = PipelineBackend(stages, backend_named("ort"), ClusterSettings(start_s=0.05), launcher)
    error = refused("DSX-E744", lambda: CompiledModel(stages.bundle, 1, backend))
    assert "0.05" in error.what
    assert set(children()) <= before
