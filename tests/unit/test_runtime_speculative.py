"""投机解码：输出与普通解码相同，草稿与从头算的相同，统计、止损线与报错。"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.errors import DsxError
from deepseek_export.runtime import (
    Generator,
    MeasuredFloor,
    SamplingParams,
    SpeculativeFloor,
    SpeculativeGenerator,
)
from deepseek_export.runtime.speculation.floor import Round, Watch
from deepseek_export.runtime.speculation.stats import Tally
from tests.unit.test_runtime_speculative_toy import (
    LIMIT,
    build,
    draft_oracle,
    make_drafts,
    markov,
    one_by_one,
)
from tests.unit.test_runtime_toy import VOCAB, make_toy

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(3)
RAGGED = [RNG.integers(0, VOCAB, size).tolist() for size in (11, 1, 4, 7, 2, 23, 3, 16)]
TOY = make_toy(LIMIT)


class Seen:
    """on_token 回调：逐行记下来。"""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __call__(self, row: int, token: int) -> None:
        self.rows[row].append(token)


def plain(generator: SpeculativeGenerator, *args: Any, **kwargs: Any) -> list[list[int]]:
    return one_by_one(generator).generate(*args, **kwargs).token_ids


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_output_is_plain_and_drafts_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, modules: int, chunk: int
) -> None:
    """每一次验证调用里，每一行的草稿都等于按定义从头算出来的草稿。"""
    drafts = make_drafts(TOY, modules)
    generator = build(tmp_path, TOY, drafts, count, chunk=chunk)
    calls: list[tuple[np.ndarray, np.ndarray]] = []
    verify = generator.session.verify

    def spy(ids: np.ndarray, past: np.ndarray, positions: np.ndarray, *rest: Any) -> Any:
        if rest[0].shape[1]:
            calls.append((ids.copy(), past.copy()))
        return verify(ids, past, positions, *rest)

    monkeypatch.setattr(generator.session, "verify", spy)
    for prompts in ([RAGGED[0]], RAGGED):
        want = [TOY.greedy(prompt, 13) for prompt in prompts]
        calls.clear()
        result = generator.generate(prompts, 13)
        assert result.token_ids == want
        whole = [prompt + ids for prompt, ids in zip(prompts, want, strict=True)]
        for ids, past in calls:
            for line, start in zip(ids.tolist(), past.tolist(), strict=True):
                known = [row[: start + 1] for row in whole if start + 1 < len(row)]
                # 结束了的行离开批次，别的行补上它的位置，所以不看是第几行。
                assert line in [
                    [row[-1], *draft_oracle(TOY, drafts[:count], row, ids.shape[1] - 1)] for row in known
                ]
        stats = result.speculation
        assert stats is not None
        assert stats.main_calls < 13
        assert 1 < stats.tokens_per_call <= count + 1
        assert json.loads(json.dumps(stats.as_dict()))["num_draft_tokens"] == count


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("split_kv", [False, True])
def test_every_cache_kind(tmp_path: Path, cache_dtype: str, split_kv: bool) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 3, cache_dtype=cache_dtype, split_kv=split_kv)
    assert generator.generate(RAGGED, 9).token_ids == plain(generator, RAGGED, 9)


def test_eos_in_an_accepted_run_and_uneven_lengths(tmp_path: Path) -> None:
    toy = markov()
    free = [toy.greedy(prompt, 24) for prompt in RAGGED]
    for eos in {token for ids in free for token in ids[1:4]}:
        generator = build(tmp_path, toy, make_drafts(toy, 1, mix=0), 4, eos=(eos,))
        expected = one_by_one(generator).generate(RAGGED, 24)
        seen: list[list[int]] = [[] for _ in RAGGED]
        result = generator.generate(RAGGED, 24, on_token=Seen(seen))
        assert result.token_ids == seen == expected.token_ids
        assert result.finish_reasons == expected.finish_reasons
        assert generator.generate(RAGGED, 24, ignore_eos=True).token_ids == free


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10])
def test_any_number_of_new_tokens(tmp_path: Path, steps: int) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 2), 3)
    result = generator.generate(RAGGED, steps)
    assert result.token_ids == plain(generator, RAGGED, steps)
    assert result.new_tokens == 8 * steps


@pytest.mark.parametrize("modules", [1, 2])
def test_up_to_the_position_limit(tmp_path: Path, modules: int) -> None:
    """位置表只有 LIMIT 行，多写一格 ONNX Runtime 就报错。"""
    ids = np.random.default_rng(6).integers(0, VOCAB, LIMIT).tolist()
    generator = build(tmp_path, TOY, make_drafts(TOY, modules), 4, chunk=64)
    for rows in ([ids[:-7]], [ids, ids[:-1], ids[:-2], ids[:-9], ids[:5]], [ids]):
        result = generator.generate(rows, 20)
        assert result.token_ids == plain(generator, rows, 20)
    assert result.token_ids == [[]]


def test_growth_across_a_bucket(tmp_path: Path) -> None:
    ids = np.random.default_rng(5).integers(0, VOCAB, 250).tolist()
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 3, chunk=64)
    rows = [ids, ids[:9]]
    assert generator.generate(rows, 20).token_ids == [TOY.greedy(row, 20) for row in rows]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("modules", [1, 2])
def test_always_right_and_always_wrong(tmp_path: Path, count: int, modules: int) -> None:
    toy = markov()
    steps = 1 + 5 * (count + 1)
    right = build(tmp_path, toy, make_drafts(toy, modules, mix=0), count).generate(RAGGED, steps).speculation
    wrong = build(tmp_path, toy, make_drafts(toy, modules, mix=0, twist=1), count).generate(RAGGED, steps)
    assert right is not None
    assert (right.tokens_per_call, right.mean_accepted, right.main_calls) == (count + 1, count, 5)
    assert right.acceptance == right.acceptance_overall == [1.0] * count
    assert right.draft_calls == 5 * max(count, min(modules, count))
    stats = wrong.speculation
    assert stats is not None
    assert wrong.token_ids == [toy.greedy(prompt, steps) for prompt in RAGGED]
    assert (stats.tokens_per_call, stats.mean_accepted, stats.main_calls) == (1, 0, steps - 1)
    assert stats.acceptance == [0.0] + [None] * (count - 1)
    assert stats.acceptance_overall == [0.0] * count


def test_floor(tmp_path: Path) -> None:
    """猜不中就停，猜得中就不停；停与不停输出都不变。"""
    toy = markov()
    wrong = build(tmp_path, toy, make_drafts(toy, 1, twist=1), 2, floor=SpeculativeFloor(0.1, window=4))
    result = wrong.generate(RAGGED, 20)
    assert result.token_ids == [toy.greedy(prompt, 20) for prompt in RAGGED]
    assert result.speculation is not None
    assert (result.speculation.fell_back, result.speculation.draft_calls) == (True, 4 * 2)
    assert result.speculation.main_calls == 19
    assert "止损线 0.10" in result.notes[0]
    right = build(tmp_path, toy, make_drafts(toy, 1, mix=0), 2, floor=SpeculativeFloor(1.9, window=4))
    result = right.generate(RAGGED, 30)
    assert result.speculation is not None
    assert not result.speculation.fell_back
    assert result.notes == ()


@dataclass(frozen=True)
class _Priced(MeasuredFloor):
    """用定好的价钱代替秒表：普通一轮 1 秒，带草稿的一轮 ``drafted`` 秒。"""

    drafted: float = 1.0

    def watch(self, num_draft_tokens: int) -> Watch:
        inner, price = super().watch(num_draft_tokens), self.drafted

        class Priced:
            wants_plain = property(lambda _: inner.wants_plain)

            def add(self, latest: Round) -> str | None:
                return inner.add(replace(latest, seconds=price if latest.drafts else 1.0))

        return Priced()


def test_measured_floor(tmp_path: Path) -> None:
    """MTP-4：全中的 2 个草稿值 3 个 token：一轮贵过 3 步就停，不到 3 步就一直投机；停与不停输出都不变。"""
    toy = markov()
    steps = 90
    want = [toy.greedy(prompt, steps) for prompt in RAGGED]
    for modules, price, stops in ((1, 3.1, True), (2, 3.1, True), (1, 2.9, False), (2, 2.9, False)):
        floor = _Priced(window=4, probe=3, drafted=price)
        result = build(tmp_path, toy, make_drafts(toy, modules, mix=0), 2, floor=floor).generate(
            RAGGED, steps
        )
        assert result.token_ids == want
        stats = result.speculation
        assert stats is not None
        assert stats.fell_back is stops
        if stops:
            assert "每个 token 129 ms，普通解码 125 ms" in result.notes[0]
            assert stats.draft_calls == 4 * 2
            assert stats.main_calls == 4 + (steps - 1 - 4 * 3)
        else:
            # 补算了普通解码那几行之后草稿仍然全中：投机 4、8、15 轮，中间各比一次，末尾一轮只要 1 个草稿。
            assert stats.acceptance == [1.0, 1.0]
            assert stats.main_calls == 4 + 3 + 8 + 3 + 15 + 1
            assert stats.draft_calls == (4 + 8 + 15) * 2 + modules


def test_measured_floor_ignores_the_slow_first_round() -> None:
    watch = MeasuredFloor(window=3, probe=3).watch(2)
    for seconds in (9.0, 1.0, 1.0):
        assert not watch.wants_plain
        assert watch.add(Round(2, 1, 1, 2, seconds)) is None
    assert watch.add(Round(1, 1, 1, 2, 9.0)) is None  # 末尾收缩了的草稿不算
    assert watch.wants_plain
    assert watch.add(Round(0, 1, 0, 1, 7.0)) is None
    assert watch.add(Round(0, 1, 0, 1, 0.4)) is None
    verdict = watch.add(Round(0, 1, 0, 1, 0.4))
    assert verdict is not None
    assert "500 ms，普通解码 400 ms" in verdict


def test_floor_from_config() -> None:
    configs = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())
    config = parse_model_config(configs["V3"], "V3")
    one = SpeculativeFloor.from_config(config, 1).min_acceptance
    assert 0.02 < one < 0.1
    assert SpeculativeFloor.from_config(config, 2).min_acceptance == pytest.approx(2 * one)


def test_tally_leaves_out_what_was_cut() -> None:
    tally = Tally(3, "greedy")
    tally.add(proposed=3, accepted=1, tokens=2)
    tally.add(proposed=2, accepted=2, tokens=2)
    tally.add(proposed=0, accepted=0, tokens=1)
    stats = tally.stats(draft_calls=9, fell_back=False)
    assert stats.acceptance == [1.0, 0.5, None]
    assert stats.acceptance_overall == [1.0, 0.5, 0.0]
    assert (stats.mean_accepted, stats.tokens_per_call) == (1.5, 5 / 3)


def test_rounds_of_one_shape_rebind_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """每次都全中时，形状不变，稳态里不再绑定任何东西。"""
    toy = markov()
    generator = build(tmp_path, toy, make_drafts(toy, 1, mix=0), 1)
    bound: list[str] = []
    original = ort.IOBinding.bind_ortvalue_output

    def spy(self: object, name: str, value: object) -> None:
        bound.append(name)
        original(self, name, value)

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_output", spy)
    counts = []
    for steps in (11, 41):
        bound.clear()
        generator.generate([RAGGED[0]], steps)
        counts.append(len(bound))
    assert counts[0] == counts[1]


def test_rejection_output_has_the_plain_distribution(tmp_path: Path) -> None:
    """几千次短生成：前两个 token 的联合分布与第三个的边缘分布，对照精确概率做卡方检验。"""
    temperature, batch, rounds = 0.9, 250, 24
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 2, verify="rejection")
    counts = np.zeros((VOCAB, VOCAB, VOCAB))
    prompt = [3, 1]
    accepted = []
    for number in range(rounds):
        params = SamplingParams(temperature=temperature, seed=number * batch)
        result = generator.generate([prompt] * batch, 3, params)
        for ids in result.token_ids:
            counts[tuple(ids)] += 1
        assert result.speculation is not None
        accepted.append(result.speculation.mean_accepted)
    assert 0.1 < np.mean(accepted) < 1.9

    def dist(ids: list[int]) -> np.ndarray:
        scores = TOY.forward(ids)[-1].astype(np.float64) / temperature
        probs = np.exp(scores - scores.max())
        return probs / probs.sum()

    first = dist(prompt)
    second = np.array([dist([*prompt, a]) for a in range(VOCAB)])
    third = np.array([[dist([*prompt, a, b]) for b in range(VOCAB)] for a in range(VOCAB)])
    exact = first[:, None, None] * second[:, :, None] * third
    for axes in ((2,), (0,), (0, 1)):
        _chi_square(counts.sum(axis=axes).ravel(), exact.sum(axis=axes).ravel())


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> None:
    """期望不足 5 的格子并成一格；Wilson–Hilferty 近似下显著性 0.001。"""
    expected = probs * counts.sum()
    small = expected < 5
    got, want = counts[~small], expected[~small]
    if small.any():
        got, want = np.append(got, counts[small].sum()), np.append(want, expected[small].sum())
    degrees = len(want) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    assert ((got - want) ** 2 / want).sum() < bound


def test_rejection_repeats_with_a_seed(tmp_path: Path) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 2), 3, verify="rejection", chunk=5)
    params = SamplingParams(temperature=1.3, seed=4)
    first = generator.generate(RAGGED, 10, params).token_ids
    assert first == generator.generate(RAGGED, 10, params).token_ids
    assert first != generator.generate(RAGGED, 10, SamplingParams(temperature=1.3, seed=99)).token_ids
    assert plain(generator, RAGGED, 6) == [TOY.greedy(prompt, 6) for prompt in RAGGED]


@pytest.fixture(scope="module", params=[1, 3])
def sampling_generator(request: pytest.FixtureRequest, tmp_path_factory) -> SpeculativeGenerator:
    """一个与三个模块；草稿数由测试改。"""
    folder = tmp_path_factory.mktemp("sampling")
    return build(folder, TOY, make_drafts(TOY, request.param), 8, verify="rejection", chunk=64)


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
#: 离最大长度只剩几个：同批别的行因此不能都提出一样多的草稿。
NEARLY_FULL = st.integers(LIMIT - 12, LIMIT).map(lambda n: [i % VOCAB for i in range(n)])


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_seeded_row_is_the_same_alone_and_among_others(
    sampling_generator: SpeculativeGenerator, data: st.DataObject
) -> None:
    """RUNTIME-5：随机的同伴、余量、草稿数、结束符、止损线；每一行都与单独跑（种子是 seed + 行号）的逐个 token 相同。"""
    g = sampling_generator
    g.num_draft_tokens = data.draw(st.integers(1, 8), "K")
    g.floor = data.draw(
        st.none() | st.builds(SpeculativeFloor, st.floats(0, 1.5), st.integers(1, 3)), "floor"
    )
    g.eos_token_ids = data.draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=2), "eos")
    rows = data.draw(st.lists(PROMPTS | NEARLY_FULL, min_size=2, max_size=5), "rows")
    seed = data.draw(st.integers(0, 1 << 70), "seed")
    steps = data.draw(st.integers(1, 24), "steps")
    temperature = data.draw(st.sampled_from([0.3, 1.0, 1.7]), "temperature")
    together = g.generate(rows, steps, SamplingParams(temperature=temperature, seed=seed))
    for row, prompt in enumerate(rows):
        alone = g.generate([prompt], steps, SamplingParams(temperature=temperature, seed=seed + row))
        assert together.token_ids[row] == alone.token_ids[0]
        assert together.finish_reasons[row] == alone.finish_reasons[0]


def test_a_floor_stops_one_row_at_a_time(tmp_path: Path) -> None:
    """MTP-4：猜不中的行停下，猜得中的接着投机；停不停只看它自己。"""
    floor = SpeculativeFloor(0.3, window=4)
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 2, verify="rejection", floor=floor)
    alone = []
    for row, prompt in enumerate(RAGGED):
        stats = generator.generate([prompt], 40, SamplingParams(temperature=1.5, seed=row)).speculation
        assert stats is not None
        alone.append(stats)
    stopped = sum(stats.fell_back for stats in alone)
    assert 1 < stopped < len(RAGGED)
    together = generator.generate(RAGGED, 40, SamplingParams(temperature=1.5, seed=0))
    assert together.speculation is not None
    assert together.speculation.main_calls == max(stats.main_calls for stats in alone)
    assert together.notes[0].endswith(f"（另有 {stopped - 1} 行也停了）")


def test_a_clock_cannot_stop_seeded_rejection(tmp_path: Path) -> None:
    """MTP-4：看时间的止损线停在哪一轮重现不了；不给种子就可以。"""
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 1, verify="rejection", floor=MeasuredFloor())
    with pytest.raises(DsxError, match="floor=MeasuredFloor") as caught:
        generator.generate([[1]], 2, SamplingParams(temperature=1.0, seed=0))
    assert caught.value.code == "DSX-E516"
    assert generator.generate([[1]], 2, SamplingParams(temperature=1.0)).new_tokens == 2


@pytest.mark.parametrize("verify", ["greedy", "rejection"])
def test_teacher_forced_logits_still_work(tmp_path: Path, verify: str) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 1, verify=verify)
    for chunk in (None, 3):
        for ids, got in zip(RAGGED, generator.logits(RAGGED, chunk), strict=True):
            assert got == pytest.approx(TOY.forward(ids), abs=1e-4)


@pytest.mark.parametrize("modules", [1, 2])
def test_logprobs_are_those_of_plain_decoding(tmp_path: Path, modules: int) -> None:
    """RUNTIME-14：对数概率与逐个 token 解码的相同，到最大长度为止都对得上。"""
    toy = make_toy(LIMIT)
    made = build(tmp_path, toy, make_drafts(toy, modules), 4)
    prompts = [np.random.default_rng(1).integers(0, VOCAB, LIMIT - 9).tolist(), [3, 1]]
    params = SamplingParams(logprobs=2)
    got = made.generate(prompts, 40, params)
    want = Generator(made.session, None, ()).generate(prompts, 40, params)
    assert got.token_ids == want.token_ids
    assert got.logprobs is not None
    assert want.logprobs is not None
    for mine, plain_ones in zip(got.logprobs, want.logprobs, strict=True):
        assert [(one.token, [token for token, _ in one.top]) for one in mine] == [
            (one.token, [token for token, _ in one.top]) for one in plain_ones
        ]
        assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in plain_ones], abs=1e-4)
