"""服务引擎的举止：排队、取消、失败、关闭、计数。模型是最小的真模型；与单独跑的比较在 test_serving_contract。"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.errors import DsxError
from deepseek_export.runtime import Generator, ModelSession, SamplingParams
from deepseek_export.serving import Engine, EngineSettings, Request
from tests.engines import refused
from tests.threads import engine_threads, left_behind
from tests.unit.test_runtime_toy import VOCAB, Toy, make_toy, save_toy

pytestmark = pytest.mark.unit

LIMIT = 600
LONG = np.random.default_rng(0).integers(0, VOCAB, 500).tolist()


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy(LIMIT)


@pytest.fixture
def session(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    path = save_toy(toy, tmp_path_factory.mktemp("toy") / "model.onnx", external=True)
    return ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """SERVE-4：每个测试之后，它的引擎的线程都结束了；别的文件的由 conftest.py 看着。"""
    before = engine_threads()
    yield
    assert not left_behind(before, seconds=0)


class Calls:
    """记下每次模型调用的形状，可以让其中几次出错。"""

    def __init__(self, session: ModelSession, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.trouble: dict[int, Exception] = {}
        self.spoil: Callable[[np.ndarray], None] = lambda logits: None
        run = session.run

        def recorded(ids, *rest):
            self.shapes.append(ids.shape)
            if (error := self.trouble.get(len(self.shapes))) is not None:
                raise error
            logits = run(ids, *rest)
            self.spoil(logits)
            return logits

        monkeypatch.setattr(session, "run", recorded)


@pytest.fixture
def calls(session: ModelSession, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(session, monkeypatch)


def later(engine: Engine, action: Callable[[], object], after: int = 1) -> Callable[[Request], None]:
    """一个 listener：给出 ``after`` 个 token 时做一件事。"""

    def listen(request: Request) -> None:
        if len(request.token_ids) == after and not request.done:
            action()

    return listen


def test_streaming_and_reasons(toy: Toy, session: ModelSession) -> None:
    """SERVE-9：各自的上限、eos、停止 token、采样参数；迭代几次都从头给。"""
    want = toy.greedy([3, 1, 4], 12)
    eos = want[5]
    at = want.index(eos) + 1
    with Engine(session, [eos], EngineSettings(slots=4)) as engine:
        stopped = engine.submit([3, 1, 4], max_new_tokens=12)
        ignoring = engine.submit([3, 1, 4], max_new_tokens=12, ignore_eos=True)
        stop = engine.submit([3, 1, 4], max_new_tokens=12, stop_token_ids=[want[1]], ignore_eos=True)
        short = engine.submit([3, 1, 4], max_new_tokens=2, ignore_eos=True)
        hot = engine.submit(
            [3, 1, 4], SamplingParams(temperature=1.0, top_k=1), max_new_tokens=12, ignore_eos=True
        )
        assert list(stopped) == list(stopped) == want[:at]
        assert list(ignoring) == list(hot) == want
    results = [one.result() for one in (stopped, ignoring, stop, short)]
    assert [one.reason for one in results] == ["eos", "length", "stop", "length"]
    assert results[2].token_ids == want[: want.index(want[1]) + 1]
    assert results[3].token_ids == want[:2]
    line = results[0].timeline
    assert line.submitted <= line.started <= line.first_token <= line.finished
    assert engine.stats.finished == {"eos": 1, "stop": 1, "length": 3, "cancelled": 0, "error": 0}
    assert engine.stats.generated_tokens == sum(len(one.token_ids) for one in (*results, hot.result()))


def test_a_long_prompt_does_not_stall_others(session: ModelSession, calls: Calls) -> None:
    """SERVE-2：别人的两步之间至多一块，一块至多 ``prefill_tokens`` 个 token、一行。"""
    with Engine(session, [], EngineSettings(slots=3, prefill_tokens=20, prefix_reuse=False)) as engine:
        sent: list[Request] = []

        def send() -> None:
            sent.extend(engine.submit(LONG[at:], max_new_tokens=3) for at in (0, 1))

        engine.submit([5], max_new_tokens=60, listener=later(engine, send)).result()
    assert [one.result().prompt_tokens for one in sent] == [500, 499]
    prefills = [at for at, shape in enumerate(calls.shapes) if shape[1] > 1]
    assert sum(calls.shapes[at][1] for at in prefills) == 999
    assert {calls.shapes[at] for at in prefills} <= {(1, 20), (1, 19)}
    assert all(two - one > 1 for one, two in pairwise(prefills))
    assert engine.stats.prefill_tokens == 1000


def test_active_rows_are_dense(session: ModelSession, calls: Calls) -> None:
    """结束了的不占一步的计算：一步的行数就是还没结束的请求数。"""
    with Engine(session, [], EngineSettings(slots=4)) as engine:
        first = engine.submit(
            [1, 2],
            max_new_tokens=12,
            listener=later(engine, lambda: [engine.submit([n], max_new_tokens=n) for n in (5, 9, 6)]),
        )
        first.result()
    rows = [shape[0] for shape in calls.shapes]
    assert max(rows) == 4
    assert engine.stats.prefill_calls == 4
    assert sum(rows) == engine.stats.generated_tokens == 12 + 5 + 9 + 6  # 各自的第一个 token 来自 prefill


@pytest.mark.parametrize("slots", [1, 2])
def test_cancelling(toy: Toy, session: ModelSession, slots: int) -> None:
    """SERVE-3：排队的、算提示词的、生成的都在一步之内结束；算好的前缀留着。"""
    with Engine(session, [], EngineSettings(slots=slots, prefill_tokens=10)) as engine:
        seen: list[int] = []

        def listen(request: Request) -> None:
            if len(request.token_ids) == 1:
                others.extend(engine.submit(prompt, max_new_tokens=5) for prompt in (LONG, [2]))
            if len(request.token_ids) == 3 and not request.done:
                seen.append(engine.stats.prefill_tokens)
                for one in (*others, request):
                    one.cancel()

        others: list[Request] = []
        first = engine.submit([1], max_new_tokens=100, listener=listen)
        assert first.result().reason == "cancelled"
        assert [one.result().reason for one in others] == ["cancelled"] * 2
        assert first.result().token_ids == toy.greedy([1], 3)
        assert [one.token_ids for one in others] == [[], []]
        assert engine.stats.prefill_tokens == seen[0]
        again = engine.submit(LONG, max_new_tokens=5).result()
        assert again.token_ids == toy.greedy(LONG, 5)
        assert again.cached_tokens == seen[0] - 1
        first.cancel()
    assert first.result().reason == "cancelled"
    assert engine.stats.finished["cancelled"] == 3


def test_queue_is_bounded_and_in_order(session: ModelSession) -> None:
    """SERVE-8：满了按码拒绝，走了一个又能收；先来先走。"""
    order: list[int] = []
    codes: list[str] = []
    with Engine(session, [], EngineSettings(slots=1, queue=2)) as engine:
        held, given = threading.Event(), threading.Event()

        def listen(request: Request) -> None:
            given.set()
            assert held.wait(30)

        running = engine.submit([1], max_new_tokens=2, listener=listen)
        assert given.wait(30)
        for n in range(3):
            try:
                engine.submit([n], max_new_tokens=1, listener=lambda one, n=n: order.append(n))
            except DsxError as error:
                codes.append(error.code)
        held.set()
        running.result()
    assert (order, codes) == ([0, 1], ["DSX-E530"])


def test_bad_requests_are_refused_at_once(session: ModelSession, calls: Calls) -> None:
    """SERVE-8：不合格的在提交时就拒绝，不计算。"""
    with Engine(session, [], EngineSettings(context=40)) as engine:
        cases: list[tuple[str, list, dict]] = [
            ("DSX-E510", [], {}),
            ("DSX-E511", [1] * 41, {}),
            ("DSX-E509", [VOCAB], {}),
            ("DSX-E509", [1], {"stop_token_ids": [-1]}),
            ("DSX-E512", [1], {"max_new_tokens": 0}),
            ("DSX-E532", [1], {"cache_salt": 3}),
        ]
        for code, prompt, options in cases:
            refused(code, lambda p=prompt, o=options: engine.submit(p, **{"max_new_tokens": 1} | o))
        assert "context" in refused("DSX-E511", lambda: engine.submit([1] * 41, max_new_tokens=1)).what
        assert engine.submit([1] * 40, max_new_tokens=5).result().token_ids == []
        assert not calls.shapes
        full = engine.submit([1] * 39, max_new_tokens=10**30).result()
        assert (len(full.token_ids), full.reason) == (1, "length")


def test_settings_are_checked(session: ModelSession) -> None:
    """取值不成立、与模型不合，都是 ``DSX-E532``。"""
    for bad in (
        {"slots": 0},
        {"slots": True},
        {"queue": -1},
        {"prefill_tokens": 0},
        {"rows": 7},
        {"cache_bytes": 1.5},
    ):
        refused("DSX-E532", lambda bad=bad: EngineSettings(**bad))
    per_token = session.runner.contract.caches.bytes_per_token
    for bad in ({"context": LIMIT + 1}, {"cache_bytes": 8 * LIMIT * per_token - 1}):
        refused("DSX-E532", lambda bad=bad: Engine(session, [], EngineSettings(**bad)))
    fitted = EngineSettings(prefill_tokens=10**6, cache_bytes=8 * LIMIT * per_token).fitted(session)
    assert (fitted.rows, fitted.context, fitted.prefill_tokens) == (8, LIMIT, session.limits.prefill_chunk)


def test_failed_calls_fail_those_present(toy: Toy, session: ModelSession, calls: Calls) -> None:
    """SERVE-7：生成的一步失败，在场的都得到后端的错误；排队的照常，健康状况随最近一次调用。"""
    healthy: list[bool] = []
    calls.trouble[4] = DsxError("DSX-E513", "装作执行失败", "再试")
    calls.trouble[5] = DsxError("DSX-E513", "又一次", "再试")
    with Engine(session, [], EngineSettings(slots=2)) as engine:
        one = engine.submit([1, 2], max_new_tokens=9, listener=lambda _: healthy.append(engine.healthy))
        with pytest.raises(DsxError, match="DSX-E513"):
            one.result()
        assert one.token_ids == toy.greedy([1, 2], 3)
        assert healthy == [True, True, True, False]
        assert not engine.healthy
        assert engine.failure is calls.trouble[4]
        two = engine.submit([1, 2, 3], max_new_tokens=9)
        with pytest.raises(DsxError, match="又一次"):
            list(two)
        assert two.token_ids == []
        three = engine.submit([1, 2, 3], max_new_tokens=9)
        assert list(three) == toy.greedy([1, 2, 3], 9)
        assert three.result().cached_tokens == 0
        assert engine.healthy
        assert engine.failure is None
    assert not engine.healthy
    assert engine.stats.finished["error"] == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_fail_one_row(session: ModelSession, calls: Calls, temperature: float) -> None:
    """SERVE-7：一行的 logits 是 NaN，只有它失败，它的前缀也不再用。"""
    sampling = SamplingParams(temperature=temperature, seed=1)
    with Engine(session, [], EngineSettings(slots=3)) as engine:

        def spoil(logits: np.ndarray) -> None:
            if len(logits) == 3:
                logits[1] = np.nan

        def others() -> None:
            rest.extend(engine.submit([n, n], sampling, max_new_tokens=8) for n in (2, 3))

        rest: list[Request] = []
        calls.spoil = spoil
        first = engine.submit([1, 1], sampling, max_new_tokens=12, listener=later(engine, others))
        assert len(list(first)) == 12
        with pytest.raises(DsxError, match="DSX-E505"):
            list(rest[0])
        assert len(list(rest[1])) == 8
        calls.spoil = lambda logits: None
        assert engine.submit([2, 2], max_new_tokens=1).result().cached_tokens == 0
    assert engine.stats.finished["error"] == 1


def test_internal_errors_stop_the_engine(session: ModelSession, calls: Calls) -> None:
    """SERVE-7：dsx 的缺陷让引擎停下，没有谁永远等下去。"""
    calls.trouble[3] = ValueError("缺陷")
    with Engine(session, [], EngineSettings(slots=1)) as engine:
        waiting: list[Request] = []
        one = engine.submit(
            [1],
            max_new_tokens=9,
            listener=later(engine, lambda: waiting.append(engine.submit([2], max_new_tokens=3))),
        )
        for request in (one, *waiting):
            with pytest.raises(ValueError, match="缺陷"):
                request.result()
        assert len(waiting) == 1
        assert engine.close()
        assert not engine.healthy
        assert engine.failure is calls.trouble[3]
        assert "缺陷" in refused("DSX-E531", lambda: engine.submit([1], max_new_tokens=1)).what


def test_listeners_fail_alone(toy: Toy, session: ModelSession) -> None:
    """SERVE-7：``listener`` 的错误只算在它自己的请求头上。"""

    def broken(request: Request) -> None:
        raise RuntimeError("别人的代码")

    with Engine(session, [], EngineSettings(slots=2)) as engine:
        bad = engine.submit([1], max_new_tokens=5, listener=broken)
        good = engine.submit([2], max_new_tokens=5)
        with pytest.raises(RuntimeError, match="别人的代码"):
            bad.result()
        assert list(good) == toy.greedy([2], 5)


def test_closing(toy: Toy, session: ModelSession) -> None:
    """SERVE-4：收下了的做完；改成不等就全部取消；关了之后按码拒绝，可以再关一次。"""
    with Engine(session, [], EngineSettings(slots=2)) as engine:
        requests = [engine.submit([n], max_new_tokens=6) for n in range(5)]
    assert [list(one) for one in requests] == [toy.greedy([n], 6) for n in range(5)]
    assert "关闭" in refused("DSX-E531", lambda: engine.submit([1], max_new_tokens=1)).what
    assert engine.close()

    engine = Engine(session, [], EngineSettings(slots=1))
    held, given = threading.Event(), threading.Event()

    def listen(request: Request) -> None:
        given.set()
        assert held.wait(30)

    running = engine.submit([1], max_new_tokens=500, listener=listen)
    waiting = engine.submit([2], max_new_tokens=500)
    assert given.wait(30)
    assert not engine.close(timeout=0)
    refused("DSX-E531", lambda: engine.submit([1], max_new_tokens=1))
    held.set()
    assert engine.close(drain=False)
    assert running.result().reason == waiting.result().reason == "cancelled"
    running = engine_left_by_an_error(session)
    assert running.result().reason == "cancelled"


def engine_left_by_an_error(session: ModelSession) -> Request:
    try:
        with Engine(session, [], EngineSettings(slots=1)) as engine:
            running = engine.submit([1], max_new_tokens=500)
            raise KeyError
    except KeyError:
        return running


def test_waiting_for_a_result_has_a_limit(session: ModelSession) -> None:
    with Engine(session, [], EngineSettings(slots=1)) as engine:
        held = threading.Event()
        request = engine.submit([1], max_new_tokens=2, listener=lambda one: held.wait(30) and None)
        with pytest.raises(TimeoutError):
            request.result(timeout=0)
        held.set()
        assert request.result(timeout=30).reason == "length"


def test_many_threads_submit(toy: Toy, session: ModelSession) -> None:
    """许多线程同时提交、收 token，各得各的；结束之后引擎不再握着它们。"""
    alive: weakref.WeakSet[Request] = weakref.WeakSet()

    def tokens(prompt: list[int]) -> list[int]:
        request = engine.submit(prompt, max_new_tokens=9)
        alive.add(request)
        return list(request)

    prompts = [[n % VOCAB, (3 * n) % VOCAB, 5] for n in range(60)]
    with Engine(session, [], EngineSettings(slots=8)) as engine, ThreadPoolExecutor(16) as pool:
        got = list(pool.map(tokens, prompts))
    assert got == [toy.greedy(prompt, 9) for prompt in prompts]
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    gc.collect()
    assert not alive


def test_penalties_and_logprobs_equal_the_generator(session: ModelSession) -> None:
    """SERVE-9：处理器、对数概率与生成器的相同，与同批还有谁无关；没有要的请求没有。"""
    prompts = [[3, 1, 4, 1], [8], [2, 7, 1]]
    asked = [
        SamplingParams(repetition_penalty=2.5, logprobs=2),
        SamplingParams(temperature=0.9, seed=4, min_p=0.05, frequency_penalty=1.0, presence_penalty=0.5),
        SamplingParams(min_tokens=6, logit_bias={5: 4.0}, allowed_token_ids=[1, 5, 7, 9], logprobs=0),
    ]
    with Engine(session, [5], EngineSettings(slots=4)) as engine:
        pairs = zip(prompts, asked, strict=True)
        requests = [engine.submit(prompt, params, max_new_tokens=9) for prompt, params in pairs]
        results = [request.result(5) for request in requests]
    for prompt, params, got in zip(prompts, asked, results, strict=True):
        want = Generator(session, None, [5]).generate([prompt], 9, params)
        assert got.token_ids == want.token_ids[0]
        if params.logprobs is None:
            assert got.logprobs is None
            assert want.logprobs is None
            continue
        assert got.logprobs is not None
        assert want.logprobs is not None
        assert [one.token for one in got.logprobs] == got.token_ids
        for one, other in zip(got.logprobs, want.logprobs[0], strict=True):
            assert len(one.top) == params.logprobs
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_request_with_nothing_to_choose_fails_alone(toy: Toy, session: ModelSession, calls: Calls) -> None:
    """SERVE-9：只许选的 token 模型一个也不给，算在那个请求头上；同批的照旧。"""

    def spoil(logits: np.ndarray) -> None:
        logits[..., 7] = -np.inf

    calls.spoil = spoil
    with Engine(session, [], EngineSettings(slots=2)) as engine:
        other = engine.submit([8], SamplingParams(logit_bias={7: -100.0}), max_new_tokens=4)
        bad = engine.submit([3, 1], SamplingParams(allowed_token_ids=[7]), max_new_tokens=4)
        refused("DSX-E518", bad.result, 5)
        assert len(other.result(5).token_ids) == 4
        for params, code in (
            (SamplingParams(allowed_token_ids=[VOCAB]), "DSX-E509"),
            (SamplingParams(min_tokens=9), "DSX-E512"),
        ):
            with pytest.raises(DsxError, match=code):
                engine.submit([3], params, max_new_tokens=4)
