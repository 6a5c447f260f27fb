"""投机时服务引擎的举止：在草稿中间结束、处理器、失败、止损线、计数。token 相同的证明在 test_serving_speculation_contract。"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from deepseek_export.errors import DsxError
from deepseek_export.runtime import Generator, SamplingParams, SpeculativeGenerator
from deepseek_export.runtime.speculation.batch_floor import BatchFloor
from deepseek_export.serving import Engine, EngineSettings
from tests.engines import refused
from tests.unit.test_runtime_speculative_toy import LIMIT, build, make_drafts, markov
from tests.unit.test_runtime_toy import Toy, make_toy

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def toy() -> Toy:
    """草稿总是猜对的玩具。"""
    return markov()


@pytest.fixture
def model(toy: Toy, tmp_path) -> SpeculativeGenerator:
    return build(tmp_path, toy, make_drafts(toy, 1, mix=0.0), 3)


def opened(model: SpeculativeGenerator, eos: tuple[int, ...] = (), **settings) -> Engine:
    options = EngineSettings(**{"slots": 4, "speculation_floor": False} | settings)
    return Engine(model.session, eos, options, model.drafts, model.num_draft_tokens)


def test_ends_inside_accepted_drafts(toy: Toy, model: SpeculativeGenerator) -> None:
    """SERVE-10：eos、停止 token、上限落在一串接受的草稿中间，就在那里截断；后面的不算提出。"""
    want = toy.greedy([3], 12)
    place = next(at for at in range(2, 12) if want[at] not in want[:at])
    with opened(model, (want[place],)) as engine:
        eos = engine.submit([3], max_new_tokens=12).result()
        stop = engine.submit([3], max_new_tokens=12, stop_token_ids=[want[place]], ignore_eos=True).result()
        lengths = [engine.submit([3], max_new_tokens=n, ignore_eos=True) for n in range(1, 12)]
        for count, request in enumerate(lengths, 1):
            assert (request.result().token_ids, request.result().reason) == (want[:count], "length")
    assert (eos.token_ids, eos.reason) == (stop.token_ids, "eos") == (want[: place + 1], "eos")
    assert stop.reason == "stop"
    stats = engine.stats
    assert stats.proposed == stats.accepted  # 总是猜对
    assert stats.drafts == stats.proposed[0]
    assert stats.draft_calls > 0


def test_a_step_is_told_once(toy: Toy, model: SpeculativeGenerator) -> None:
    """SERVE-10：一步给出几个 token，``listener`` 只调一次。"""
    heard: list[int] = []
    with opened(model) as engine:
        request = engine.submit([3], max_new_tokens=9, listener=lambda one: heard.append(len(one.token_ids)))
        assert list(request) == toy.greedy([3], 9)
    assert heard == [1, 5, 9]


class Ban:
    """不许出现与前一个 token 奇偶相同的；此前的 token 都要看到。"""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, scores: np.ndarray, tokens) -> np.ndarray:
        self.seen.append(tuple(tokens))
        scores[tokens[-1] % 2 :: 2] = -np.inf
        return scores


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_processors_see_every_draft(model: SpeculativeGenerator, temperature: float) -> None:
    """SERVE-10：处理器管着每个草稿与每个位置，结果与逐个解码的相同；草稿也照它选，所以多半接受。"""
    sampling, results = SamplingParams(temperature=temperature, seed=5), []
    for speculation in (False, 3):
        ban = Ban()
        with opened(model, speculation=speculation) as engine:
            request = engine.submit([3, 4], sampling, max_new_tokens=20, processors=[ban])
            results.append(request.result().token_ids)
    assert results[0] == results[1]
    assert all(one % 2 != two % 2 for one, two in itertools.pairwise(results[1]))
    assert sum(engine.stats.accepted) == sum(engine.stats.proposed) > 10
    line = (3, 4, *results[1])
    assert set(ban.seen) <= {line[:at] for at in range(2, len(line) + 1)}


def test_logprobs_of_every_verified_position(tmp_path) -> None:
    """SERVE-10：一步给出几个 token，各有各的对数概率，与生成器逐个解码的相同；惩罚、``min_tokens`` 也是。"""
    toy = make_toy(LIMIT)
    model = build(tmp_path, toy, make_drafts(toy, 2), 3)
    alone = Generator(model.session, None, [9])
    several = [
        SamplingParams(logprobs=2),
        SamplingParams(repetition_penalty=1.3, logprobs=1),
        SamplingParams(temperature=0.9, seed=4, min_p=0.05, frequency_penalty=1.0, logprobs=0),
        SamplingParams(temperature=1.0, seed=7, min_tokens=12, logit_bias={9: 3.0}, logprobs=3),
    ]
    with opened(model, (9,)) as engine:
        requests = [engine.submit([3, 1, 4], params, max_new_tokens=40) for params in several]
        results = [one.result() for one in requests]
    assert sum(engine.stats.accepted) > 0
    for params, got in zip(several, results, strict=True):
        want = alone.generate([[3, 1, 4]], 40, params)
        assert got.token_ids == want.token_ids[0]
        assert got.logprobs is not None
        assert want.logprobs is not None
        for one, other in zip(got.logprobs, want.logprobs[0], strict=True):
            assert (one.token, len(one.top)) == (other.token, params.logprobs)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_broken_processors_fail_alone(toy: Toy, model: SpeculativeGenerator) -> None:
    """SERVE-7：处理器抛出的错误只算在它自己的请求头上；此前的 token 仍在。"""

    def broken(scores: np.ndarray, tokens) -> np.ndarray:
        if len(tokens) == 6:
            raise RuntimeError("别人的代码")
        return scores

    with opened(model) as engine:
        bad = engine.submit([3], max_new_tokens=20, processors=[broken])
        good = engine.submit([3], max_new_tokens=20)
        with pytest.raises(RuntimeError, match="别人的代码"):
            bad.result()
        assert bad.token_ids == toy.greedy([3], 5)
        assert list(good) == toy.greedy([3], 20)


def test_failed_drafts_fail_those_present(
    toy: Toy, model: SpeculativeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SERVE-7：草稿模型的调用失败与主模型的一样算；之后照常。"""
    error = DsxError("DSX-E513", "装作执行失败", "再试")
    draft, calls = model.drafts[0], itertools.count()
    run = draft.run

    def sometimes(*arguments, **options):
        if next(calls) == 4:
            raise error
        return run(*arguments, **options)

    monkeypatch.setattr(draft, "run", sometimes)
    with opened(model) as engine:
        with pytest.raises(DsxError, match="DSX-E513"):
            engine.submit([3], max_new_tokens=20).result()
        assert engine.failure is error
        again = engine.submit([3], max_new_tokens=20)
        assert list(again) == toy.greedy([3], 20)
        assert again.cached_tokens == 0
        assert engine.healthy


def test_unusable_logits_after_some_drafts(
    toy: Toy, model: SpeculativeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SERVE-7：一串草稿中间的 logits 是 NaN，之前的照给，然后只有这一行失败。"""
    verify = model.session.verify

    def spoiled(ids, *rest):
        got = verify(ids, *rest)
        if ids.shape == (2, 4):
            got.scores.logits[1, 2:] = np.nan
        return got

    monkeypatch.setattr(model.session, "verify", spoiled)
    with opened(model) as engine:
        first = engine.submit([3], max_new_tokens=60, listener=lambda one: later(one))
        second: list = []

        def later(one) -> None:
            if not second:
                second.append(engine.submit([5], max_new_tokens=20))

        assert list(first) == toy.greedy([3], 60)
        with pytest.raises(DsxError, match="DSX-E505"):
            second[0].result()
    assert second[0].token_ids == toy.greedy([5], 3)


def test_up_to_the_last_position(tmp_path) -> None:
    """SERVE-10：一直生成到模型的最大长度，草稿不越界（位置表越界会报错）。"""
    toy = make_toy(LIMIT)
    model = build(tmp_path, toy, make_drafts(toy, 2), 3)
    prompts = [[1] * n for n in (LIMIT - 1, LIMIT - 2, LIMIT - 6, LIMIT - 15, 3)]
    with opened(model, slots=5) as engine:
        requests = [engine.submit(prompt, max_new_tokens=25) for prompt in prompts]
        got = [one.result().token_ids for one in requests]
    alone = Generator(model.session, None, ())
    assert got == [alone.generate([prompt], 25).token_ids[0] for prompt in prompts]
    assert [len(ids) for ids in got] == [1, 2, 6, 15, 25]


def test_drafts_do_not_grow_the_caches(model: SpeculativeGenerator) -> None:
    """SERVE-10：``context`` 正好一档时，草稿不让缓存升档。"""
    with opened(model, slots=2, context=256) as engine:
        full = engine.submit([1] * 240, max_new_tokens=100)
        short = engine.submit([2], max_new_tokens=30)
        assert (len(full.result().token_ids), len(short.result().token_ids)) == (16, 30)
    assert sum(engine.stats.accepted) > 0
    per_token = model.session.runner.contract.caches.bytes_per_token
    assert engine.stats.cache_bytes == 2 * (2 * 256 * per_token)


def test_settings(model: SpeculativeGenerator) -> None:
    """``speculation`` 的取值；草稿模型的缓存也算在 ``cache_bytes`` 里；不投机就不分配。"""
    for bad in (0, 9, -1, "yes", None, 1.5):
        refused("DSX-E532", lambda bad=bad: EngineSettings(speculation=bad))
    fitted = [
        EngineSettings(speculation=one).fitted(model.session, model.drafts, 3) for one in (True, False, 1, 8)
    ]
    assert [one.num_drafts for one in fitted] == [3, 0, 1, 8]
    assert EngineSettings().fitted(model.session).num_drafts == 0
    per_token = model.session.runner.contract.caches.bytes_per_token
    tight = EngineSettings(slots=1, cache_bytes=LIMIT * per_token, speculation=False)
    assert tight.fitted(model.session, model.drafts, 3).num_drafts == 0
    roomy = EngineSettings(slots=1, cache_bytes=LIMIT * per_token)
    refused("DSX-E532", lambda: roomy.fitted(model.session, model.drafts, 3))
    sizes = []
    for speculation in (False, True):
        with opened(model, speculation=speculation) as engine:
            sizes.append(engine.stats.cache_bytes)
    assert sizes[1] == 2 * sizes[0]


def played(floor: BatchFloor, rows: int, seconds: Callable[[bool], float], steps: int) -> list[bool]:
    """走 ``steps`` 步，给出每一步起草了没有；起草的一步给两个 token。"""
    ways = []
    for _ in range(steps):
        ways.append(floor.wants(rows))
        floor.add(rows, ways[-1], rows * (1 + ways[-1]), seconds(ways[-1]))
    return ways


def test_the_floor_is_kept_for_each_batch_size() -> None:
    """SERVE-12：每种批大小各量各的；输了的隔一阵再试，情形变了就换回来；赢了的越比越稀。"""
    floor = BatchFloor()
    small = played(floor, 1, lambda drafting: 1.5 if drafting else 1.0, 600)
    large = played(floor, 8, lambda drafting: 2.5 if drafting else 1.0, 600)
    assert sum(small) > 560
    assert sum(large) < 60
    gaps = [len(list(run)) for way, run in itertools.groupby(small) if way]
    assert gaps[:4] == [16, 32, 64, 128]
    turned = played(floor, 8, lambda drafting: 1.2 if drafting else 1.0, 1200)
    assert turned[-1]
    assert played(floor, 1, lambda drafting: 1.5 if drafting else 1.0, 40) == [True] * 40


def test_the_floor_decides(toy: Toy, model: SpeculativeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """SERVE-12：止损线说不就逐个解码；token 不变，也没有起草。"""
    asked: list[int] = []

    def never(floor: BatchFloor, rows: int) -> bool:
        asked.append(rows)
        return False

    monkeypatch.setattr(BatchFloor, "wants", never)
    with opened(model, speculation_floor=True) as engine:
        assert list(engine.submit([3], max_new_tokens=20)) == toy.greedy([3], 20)
    assert asked == [1] * 19
    assert (engine.stats.drafts, engine.stats.decode_steps) == (0, 19)
