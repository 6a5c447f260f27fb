"""specs/serving 里投机的承诺：投机不投机，token 都一样。"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepseek_export
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import SpeculativeGenerator
from deepseek_export.runtime.speculation.batch_floor import BatchFloor
from deepseek_export.serving import EngineSettings, scheduler
from deepseek_export.serving.accept import accepted
from tests.contract.test_serving_contract import plays, random_asks
from tests.serving_plans import Ask, assert_same_as_alone
from tests.unit.test_runtime_speculative_toy import LIMIT, build, draft_oracle, make_drafts
from tests.unit.test_runtime_toy import VOCAB, make_toy

pytestmark = pytest.mark.contract

BASE = np.random.default_rng(5).integers(0, VOCAB, 400).tolist()


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[tuple[str, int], SpeculativeGenerator]:
    """图里的判定方式与模块数 → 时对时错的草稿模型。"""
    toy, made = make_toy(LIMIT), {}
    for verify, count in (("greedy", 1), ("greedy", 2), ("rejection", 1), ("rejection", 3)):
        folder = tmp_path_factory.mktemp(f"{verify}{count}")
        made[verify, count] = build(folder, toy, make_drafts(toy, count), 3, verify=verify)
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asks=plays(),
    kind=st.sampled_from([("greedy", 1), ("greedy", 2), ("rejection", 1), ("rejection", 3)]),
    most=st.integers(1, 4),
    slots=st.integers(1, 8),
    spare=st.integers(0, 3),
    chunk=st.sampled_from([1, 3, 8, 64]),
    reuse=st.booleans(),
    floor=st.booleans(),
)
def test_drafts_never_change_a_token(toys, asks, kind, most, slots, spare, chunk, reuse, floor):
    """SERVE-10：到达、取消、采样参数、草稿数怎么随机，token 都与不投机的生成器单独跑的相同。"""
    model = toys[kind]
    options = EngineSettings(
        slots=slots,
        rows=slots + spare,
        prefill_tokens=chunk,
        prefix_reuse=reuse,
        speculation=most,
        speculation_floor=floor,
    )
    engine = assert_same_as_alone(model.session, (4,), asks, options, "float32", model.drafts, 3)
    stats = engine.stats
    assert len(stats.proposed) == len(stats.accepted) == most
    assert all(kept <= made for kept, made in zip(stats.accepted, stats.proposed, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    asks=plays(),
    kind=st.sampled_from([("greedy", 1), ("greedy", 2), ("rejection", 3)]),
    slots=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 8, 64]),
    plain=st.sets(st.integers(0, 60)),
)
def test_drafts_are_the_same_as_from_scratch(toys, asks, kind, slots, chunk, plain):
    """SERVE-11：前缀不论是复制的、接着用的，中间有几步没有投机，同批的各走了几个，起草的都与照定义从头算的相同。"""
    model = toys[kind]
    toy = make_toy(LIMIT)
    modules, steps, checked = make_drafts(toy, kind[1]), itertools.count(), []

    def checking(request, logits, best, peaks, drafts, row):
        if drafts and request.work.sampler.plain:
            assert drafts == draft_oracle(toy, modules, request.sequence.tolist(), len(drafts))
            checked.append(len(drafts))
        return accepted(request, logits, best, peaks, drafts, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "accepted", checking)
        patch.setattr(BatchFloor, "wants", lambda floor, rows: next(steps) not in plain)
        options = EngineSettings(slots=slots, rows=slots + 2, prefill_tokens=chunk)
        assert_same_as_alone(model.session, (4,), asks, options, "float32", model.drafts, 3)


def test_long_plain_stretches_are_caught_up(toys):
    """SERVE-11：止损线让引擎逐个解码了很久，再投机时起草的也与从头算的相同。"""
    model, toy = toys["greedy", 2], make_toy(LIMIT)
    modules, steps, checked = make_drafts(toy, 2), itertools.count(), []
    asks = [Ask(BASE[:20], 150), Ask(BASE[40:50], 120, arrives=9), Ask(BASE[:18], 30, arrives=90)]

    def checking(request, logits, best, peaks, drafts, row):
        if drafts:
            assert drafts == draft_oracle(toy, modules, request.sequence.tolist(), len(drafts))
            checked.append(len(drafts))
        return accepted(request, logits, best, peaks, drafts, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "accepted", checking)
        patch.setattr(BatchFloor, "wants", lambda floor, rows: next(steps) % 60 > 50)
        assert_same_as_alone(model.session, (), asks, EngineSettings(slots=2), "float32", model.drafts, 3)
    assert len(checked) > 10


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> dict[str, CompiledModel]:
    """演示用的检查点，草稿模块是训练过的：float32 与 int8。"""
    made = {}
    for kind in ("float32", "int8"):
        out = tmp_path_factory.mktemp(kind) / "out"
        quantization = Quantization(kind="int8") if kind == "int8" else None
        deepseek_export.export(CHECKPOINT, out, "full", target="ort-cpu", quantization=quantization)
        made[kind] = deepseek_export.load(out)
    return made


@pytest.mark.heavy
@pytest.mark.parametrize(("kind", "slots"), [("float32", 1), ("float32", 8), ("int8", 3)])
def test_real_models_with_drafts_equal_alone(demos, kind, slots):
    """SERVE-10：真的模型与训练过的草稿，float32 与 int8（近平局照 float16 的一行，见 SERVE-1）。"""
    model = demos[kind]
    assert model.speculative is not None
    asks = random_asks(np.random.default_rng(slots), 14, model.session.vocab_size)
    options = EngineSettings(
        slots=slots, rows=slots + 2, prefill_tokens=16, speculation=3, speculation_floor=False
    )
    engine = assert_same_as_alone(
        model.session,
        tuple(model.generator.eos_token_ids),
        asks,
        options,
        "float16" if kind == "int8" else "float32",
        model.speculative.drafts,
        model.speculative.num_draft_tokens,
    )
    assert engine.stats.hit_tokens > 0
    assert sum(engine.stats.accepted) > 0


@pytest.mark.heavy
def test_engines_of_loaded_models_speculate(demos):
    """SERVE-10：``CompiledModel.engine`` 有草稿模型就投机，可以关掉、可以改草稿数；一步给出的比一个多。"""
    model = demos["float32"]
    prompt = model.encode("明月")
    counts = {}
    for speculation in (False, True, 3):
        options = EngineSettings(slots=1, speculation=speculation, speculation_floor=False)
        with model.engine(options) as engine:
            result = engine.submit(prompt, max_new_tokens=60, ignore_eos=True).result()
            again = engine.submit(prompt, max_new_tokens=60, ignore_eos=True).result()
        assert again.token_ids == result.token_ids
        counts[speculation] = result.token_ids, engine.stats.decode_steps, len(engine.stats.proposed)
    assert counts[False][0] == counts[True][0] == counts[3][0]
    assert counts[3][1] < counts[True][1] < counts[False][1] == 118
    assert [counts[one][2] for one in (False, True, 3)] == [0, 1, 3]
