"""specs/serving 的承诺。"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepseek_export
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.runtime import Generator, ModelSession, SamplingParams
from deepseek_export.serving import Engine, EngineSettings, Request, RequestResult
from tests.contract.test_mtp_contract import SMALL
from tests.engines import refused
from tests.fake_gpu import FakeGpu
from tests.serving_plans import Ask, assert_same_as_alone
from tests.unit.test_runtime_toy import VOCAB, make_toy, save_toy

pytestmark = pytest.mark.contract

LIMIT = 600
BASE = np.random.default_rng(5).integers(0, VOCAB, 400).tolist()


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ModelSession:
    path = save_toy(make_toy(LIMIT), tmp_path_factory.mktemp("toy") / "model.onnx", external=True)
    return ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT))


@st.composite
def plays(draw, vocab: int = VOCAB) -> list[Ask]:
    """几个请求：提示词多半有公共的开头；各有各的到达、上限、采样、停止与取消。"""
    asks = []
    for _ in range(draw(st.integers(1, 9))):
        shared = draw(st.sampled_from([0, 1, 7, 20, 33]))
        tail = draw(st.lists(st.integers(0, vocab - 1), min_size=0 if shared else 1, max_size=20))
        hot = draw(st.booleans())
        sampling = SamplingParams(
            temperature=draw(st.sampled_from([0.7, 1.5])) if hot else 0.0,
            top_k=draw(st.sampled_from([0, 5])),
            top_p=draw(st.sampled_from([1.0, 0.9])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.6])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
            seed=draw(st.integers(0, 3)),
        )
        asks.append(
            Ask(
                [token % vocab for token in BASE[:shared]] + tail,
                draw(st.integers(1, 14)),
                sampling,
                arrives=draw(st.integers(0, 40)),
                cancels=draw(st.sampled_from([None, None, None, 1, 4])),
                stops=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=1))),
                ignore_eos=draw(st.booleans()),
                salt=draw(st.sampled_from(["", "", "other"])),
            )
        )
    return asks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asks=plays(),
    slots=st.integers(1, 8),
    spare=st.integers(0, 3),
    chunk=st.sampled_from([1, 3, 8, 64]),
    reuse=st.booleans(),
)
def test_among_others_equals_alone(toy, asks, slots, spare, chunk, reuse):
    """SERVE-1、SERVE-5：到达、取消、行数怎么随机，每个请求的 token 都与生成器单独跑的相同，贪心与给了种子的都是。"""
    options = EngineSettings(slots=slots, rows=slots + spare, prefill_tokens=chunk, prefix_reuse=reuse)
    engine = assert_same_as_alone(toy, (4,), asks, options)
    assert reuse or engine.stats.hit_tokens == engine.stats.resident_rows == 0


def test_growing_caches_among_others(toy):
    """SERVE-1：一个请求让缓存升档，正在生成的、正在算提示词的、留着前缀的各行都跟着搬，结果不变。"""
    asks = [
        Ask(BASE[:240], 60),
        Ask([*BASE[:100], 3], 30, arrives=10),
        Ask([*BASE[:200], *BASE[:330]], 20, arrives=12),
        Ask(BASE[:250], 40, SamplingParams(temperature=1.0, seed=3), arrives=70),
    ]
    engine = assert_same_as_alone(toy, (), asks, EngineSettings(slots=3, rows=4, prefill_tokens=32))
    assert engine.stats.cache_bytes == 4 * LIMIT * toy.runner.contract.caches.bytes_per_token
    assert engine.stats.hit_tokens >= 100 + 200 + 240


def random_asks(rng: np.random.Generator, count: int, vocab: int, longest: int = 40) -> list[Ask]:
    """同 :func:`plays`，由种子定；给每次都要几秒的真模型用。"""
    base = rng.integers(0, vocab, longest).tolist()
    return [
        Ask(
            base[: int(rng.integers(0, longest))] + rng.integers(0, vocab, int(rng.integers(1, 9))).tolist(),
            int(rng.integers(1, 24)),
            SamplingParams(temperature=0.8 * (index % 3 == 2), seed=index),
            arrives=int(rng.integers(0, 60)),
            cancels=3 if index % 7 == 6 else None,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "out"
    quantization = Quantization(kind="int8")
    return deepseek_export.export(CHECKPOINT, out, "mla+moe", target="ort-cpu", quantization=quantization)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_real_models_among_others_equal_alone(exported, slots):
    """SERVE-1、SERVE-5：真的模型（float32，C++ 算子库）也是。"""
    model = deepseek_export.load(exported("v3-yarn", "mla+moe", "ort-cpu").path)
    asks = random_asks(np.random.default_rng(slots), 14, model.session.vocab_size)
    options = EngineSettings(slots=slots, rows=slots + 2, prefill_tokens=16)
    engine = assert_same_as_alone(model.session, tuple(model.generator.eos_token_ids), asks, options)
    assert engine.stats.hit_tokens > 0


@pytest.mark.heavy
@pytest.mark.parametrize("slots", [2, 8])
def test_int8_models_among_others_equal_alone(int8_bundle, slots):
    """SERVE-1、SERVE-5：int8 的也是；激活舍入到 15 位，比 float16 的 11 位细，近平局照 float16 的一行。"""
    model = deepseek_export.load(int8_bundle.path)
    asks = random_asks(np.random.default_rng(slots), 14, model.session.vocab_size)
    options = EngineSettings(slots=slots, prefill_tokens=16)
    engine = assert_same_as_alone(
        model.session, tuple(model.generator.eos_token_ids), asks, options, "float16"
    )
    assert engine.stats.hit_tokens > 0


@pytest.mark.heavy
def test_engine_backend_among_others_equals_alone(tmp_path):
    """SERVE-1、SERVE-4、SERVE-5、SERVE-10：TensorRT 的引擎走同一套，投机也是（GPU 是替身，见 tests/fake_gpu.py）；关了之后显存全部归还。"""
    checkpoint = write_checkpoint(tmp_path / "ck", SMALL, dtype="float32", mtp=True)
    bundle = deepseek_export.export(
        checkpoint, tmp_path / "out", "full", target="tensorrt-rtx", dtype="float16"
    )
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeGpu(patch)
        gpu.build(bundle)
        model = deepseek_export.load(bundle.path, backend="trt")
        assert "slots=12" in refused("DSX-E532", EngineSettings(slots=12).fitted, model.session).what
        asks = random_asks(np.random.default_rng(0), 12, model.session.vocab_size)
        options = EngineSettings(slots=4, rows=6, prefill_tokens=16, speculation_floor=False)
        eos = tuple(model.generator.eos_token_ids)
        for drafts in ([], model.speculative.drafts):
            engine = assert_same_as_alone(model.session, eos, asks, options, "float16", drafts, 3)
            assert engine.stats.hit_tokens > 0
            assert sum(engine.stats.proposed) > 0 or not drafts
            row = sum(
                one.limits.capacity(1) * one.runner.contract.caches.bytes_per_token
                for one in (model.session, *drafts)
            )
            assert engine.stats.cache_bytes == options.rows * row, "cache_bytes 按这个数算"
        assert gpu.driver.counts["launch"] > 0
        del engine, model, drafts
        gpu.build(bundle, "T=129")
        refused("DSX-E919", deepseek_export.load(bundle.path, backend="trt").engine)
        gc.collect()
        assert not gpu.driver.live


@pytest.fixture
def copied(monkeypatch) -> list[int]:
    """每次复制的位置数；存到主机与写回各算一次。"""
    counts: list[int] = []
    copy_row, save_row, restore_row = OrtCaches.copy_row, OrtCaches.save_row, OrtCaches.restore_row

    def copy(caches, source, target, length, origin=None):
        counts.append(length)
        copy_row(caches, source, target, length, origin)

    def save(caches, row, length):
        counts.append(length)
        return save_row(caches, row, length)

    def restore(caches, row, saved):
        counts.append(next(iter(saved.values())).shape[1])
        restore_row(caches, row, saved)

    for name, method in (("copy_row", copy), ("save_row", save), ("restore_row", restore)):
        monkeypatch.setattr(OrtCaches, name, method)
    return counts


def ask(engine: Engine, prompt: list[int], budget: int = 6, **options) -> RequestResult:
    return engine.submit(prompt, max_new_tokens=budget, **options).result()


def test_a_conversation_goes_on_without_copies(toy, copied):
    """SERVE-5、SERVE-6：下一轮接着用上一轮的那一行，一个字节也不复制，只算新添的；跨过缓存的档位也一样。"""
    history, generator = BASE[:10], Generator(toy, None, ())
    with Engine(toy, (), EngineSettings(slots=1, prefill_tokens=32)) as engine:
        for turn in range(12):
            result = ask(engine, history, 8)
            assert result.token_ids == generator.generate([history], 8).token_ids[0]
            assert result.cached_tokens == (len(history) - 23 if turn else 0)
            history = history + result.token_ids + BASE[turn * 20 :][:22]
        assert (len(history), copied) == (10 + 12 * 30, [])
    stats = engine.stats
    assert stats.prefill_tokens == stats.prompt_tokens - stats.hit_tokens == 10 + 11 * 23
    assert stats.resident_rows == 1


def test_branches_copy_the_common_prefix(toy, copied):
    """SERVE-5、SERVE-6：岔开的请求把公共前缀复制到另一行，原来的留着；同时来的几个相同的提示词只算一次。"""
    with Engine(toy, (), EngineSettings(slots=4)) as engine:
        first = ask(engine, BASE[:30])
        assert ask(engine, [*BASE[:20], 9, 9]).cached_tokens == common(BASE[:30], [*BASE[:20], 9, 9])
        assert copied == [35, 20]  # 原来的那一行从队首让开，再复制公共前缀
        again = ask(engine, BASE[:30])
        assert (again.token_ids, again.cached_tokens) == (first.token_ids, 29)
        before = engine.stats.prefill_tokens
        many = [engine.submit(BASE[100:130], max_new_tokens=9) for _ in range(4)]
        assert sorted(one.result().cached_tokens for one in many) == [0, 29, 29, 29]
        assert engine.stats.prefill_tokens == before + 30 + 3
        assert len({tuple(one.token_ids) for one in many}) == 1


def test_moves_cost_what_the_spec_says(toy, copied):
    """SERVE-6：不在队尾的结束时与队尾对调：短的两份，长的一份；不留前缀时只有队尾的一份。"""
    for reuse in (True, False):
        copied.clear()
        with Engine(toy, (), EngineSettings(slots=2, prefix_reuse=reuse)) as engine:
            later: list[Request] = []

            def listen(one: Request, engine=engine, later=later) -> None:
                if len(one.token_ids) == 1:
                    later.append(engine.submit(BASE[50:60], max_new_tokens=20))

            engine.submit(BASE[:30], max_new_tokens=6, listener=listen).result()
            later[0].result()
        # 第一个给出 6 个 token 时缓存里有 35 个位置；第二个晚一步加入，同一步之后有 10 + 4 个
        assert copied == ([14, 35, 14] if reuse else [14])


@pytest.mark.parametrize("touched", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
@pytest.mark.parametrize("fresh", [0, 1, 3])
def test_the_oldest_prefix_leaves_first(toy, touched, fresh):
    """SERVE-6：先取空着的行，再取最久没有用到的；``rows`` 比 ``slots`` 多几行，就多留几条。"""
    chats = [BASE[at : at + 20] for at in range(0, 160, 20)]
    for at, chat in enumerate(touched):
        with Engine(toy, (), EngineSettings(slots=1, rows=4)) as engine:
            for each in range(4):
                chats[each] = BASE[each * 20 :][:20]
                chats[each] = [*chats[each], *ask(engine, chats[each]).token_ids]
            for each in touched:
                assert ask(engine, chats[each], 1).cached_tokens == 25
            for each in range(fresh):
                assert ask(engine, chats[4 + each]).cached_tokens < 20
            assert (ask(engine, chats[chat], 1).cached_tokens == 25) == (at >= fresh)
        assert engine.stats.resident_rows == 4


@pytest.mark.parametrize(("context", "capacity"), [(200, 256), (256, 256), (258, 512), (514, LIMIT)])
def test_the_budget_decides_the_rows(toy, context: int, capacity: int):
    """SERVE-6：``cache_bytes`` 放得下几行就有几行，不到 ``slots`` 行就拒绝；长到 ``context`` 时占的正是这么多。"""
    row = capacity * toy.runner.contract.caches.bytes_per_token
    with Engine(toy, (), EngineSettings(slots=2, context=context, cache_bytes=4 * row - 1)) as engine:
        assert len(engine.slots()) == 3
        ask(engine, (BASE * 2)[: context - 1], 1)
        assert engine.stats.cache_bytes == 3 * row
    narrow = EngineSettings(slots=2, context=context, cache_bytes=2 * row - 1)
    assert str(2 * row) in refused("DSX-E532", narrow.fitted, toy).todo
    fixed = EngineSettings(slots=2, rows=3, context=context, cache_bytes=9 * row)
    assert fixed.fitted(toy).rows == 3


def test_being_copied_from_counts_as_use(toy):
    """SERVE-6：公共前缀被别人复制过，也算用到。"""
    with Engine(toy, (), EngineSettings(slots=1, rows=3)) as engine:
        first = [*BASE[:20], *ask(engine, BASE[:20]).token_ids]
        ask(engine, BASE[50:70])
        assert ask(engine, [*BASE[:20], 1, 2]).cached_tokens >= 20  # 复制到另一行
        ask(engine, BASE[100:120])
        assert ask(engine, first, 1).cached_tokens == 25


def test_reuse_can_be_switched_off(toy):
    """SERVE-5：``prefix_reuse=False`` 什么也不留。"""
    for reuse, hits in ((False, [0, 0]), (True, [0, 19])):
        with Engine(toy, (), EngineSettings(slots=1, prefix_reuse=reuse)) as engine:
            assert [ask(engine, BASE[:20]).cached_tokens for _ in range(2)] == hits


def test_salt_separates_tenants(toy):
    """SERVE-5：不同的 ``cache_salt`` 互相看不见。"""
    with Engine(toy, (), EngineSettings(slots=1, rows=5)) as engine:
        hits = [ask(engine, BASE[:30], cache_salt=salt).cached_tokens for salt in ("", "a", "b", "a", "")]
    assert hits == [0, 0, 0, 29, 29]


def common(one: list[int], two: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), len(two))
