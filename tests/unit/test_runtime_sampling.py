"""采样：参数校验、贪心并列、top-k / top-p 的集合、按行的种子。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deepseek_export.errors import DsxError
from deepseek_export.runtime import Sampler, SamplingParams
from deepseek_export.runtime.randomness import RowStream, Use
from deepseek_export.runtime.sampling import RowSampler, candidates, pick_tokens

pytestmark = pytest.mark.unit

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-20, 20).map(lambda v: v / 4))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_refused_params_name_key_and_value(key: str, value: object) -> None:
    with pytest.raises(DsxError, match=f"{key}=") as caught:
        SamplingParams(**{key: value})  # type: ignore[arg-type]
    assert caught.value.code == "DSX-E504"
    assert repr(value) in caught.value.what
    assert key in caught.value.todo


def test_greedy_ties_go_to_smaller_id() -> None:
    logits = np.array([[0, 2, 2, 1], [-np.inf, -1, -1, -1]], np.float32)
    picked = Sampler(SamplingParams(), 2).sample(logits, np.arange(2))
    assert picked.dtype == np.int64
    assert picked.tolist() == [1, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_row_is_named(bad: float, temperature: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    with pytest.raises(DsxError, match="第 1 行") as caught:
        Sampler(SamplingParams(temperature=temperature), 3).sample(logits, np.arange(3))
    assert caught.value.code == "DSX-E505"


def test_all_masked_row_is_refused() -> None:
    with pytest.raises(DsxError, match="DSX-E505"):
        Sampler(SamplingParams(), 1).sample(np.full((1, 4), -np.inf, np.float32), np.arange(1))


def test_wrong_shapes_are_a_programming_error() -> None:
    for shape, count in (((3, 4), 2), ((2, 4), 3), ((4,), 4)):
        with pytest.raises(ValueError, match=r"要求 \[n, V\]"):
            Sampler(SamplingParams(), 4).sample(np.zeros(shape, np.float32), np.arange(count))


@given(LOGITS, st.integers(0, 2**32))
def test_top_k_one_is_greedy(logits: np.ndarray, seed: int) -> None:
    sampler = Sampler(SamplingParams(temperature=1.3, top_k=1, seed=seed), 1)
    assert sampler.sample(logits[None], np.arange(1)).tolist() == [int(logits.argmax())]


@given(LOGITS, st.integers(1, 50), st.floats(0.05, 5))
def test_top_k_keeps_exactly_the_best_k(logits: np.ndarray, k: int, temperature: float) -> None:
    ids, probs = candidates(logits, SamplingParams(temperature=temperature, top_k=k))
    best = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:k]
    assert set(ids.tolist()) == set(best)
    assert probs.sum() == pytest.approx(1)


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_minimal_set(logits: np.ndarray, top_p: float) -> None:
    ids, probs = candidates(logits, SamplingParams(temperature=1.0, top_p=top_p))
    full = np.exp(logits.astype(np.float64) - logits.max())
    full /= full.sum()
    slack = 1e-12
    assert full[ids].sum() >= top_p - slack
    assert full[ids[:-1]].sum() < top_p + slack
    left_out = np.delete(full, ids)
    assert left_out.size == 0 or left_out.max() <= full[ids].min() + slack
    assert probs == pytest.approx(full[ids] / full[ids].sum())


def test_top_p_applies_after_top_k_renormalisation() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    # top-k=2 之后是 4/7、3/7：top_p=0.55 只留第一个；不先归一化的话 0.4 < 0.55 会留两个。
    ids, _ = candidates(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.55))
    assert ids.tolist() == [0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-6])
def test_tiny_temperature_tends_to_greedy(temperature: float) -> None:
    ids, probs = candidates(np.array([1.0, 3.0, 2.0]), SamplingParams(temperature=temperature))
    assert ids.tolist() == [1]
    assert probs.tolist() == [1.0]


def test_frequencies_follow_the_distribution() -> None:
    want = np.array([0.5, 0.3, 0.2])
    sampler = Sampler(SamplingParams(temperature=2.0, seed=7), 1)
    logits = 2.0 * np.log(want)[None]
    draws = np.concatenate([sampler.sample(logits, np.array([at])) for at in range(4000)])
    assert np.bincount(draws, minlength=3) / draws.size == pytest.approx(want, abs=0.03)


@settings(max_examples=30)
@given(st.integers(0, 1 << 200), st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5), st.data())
def test_row_depends_on_its_seed_and_position_alone(
    seed: int, starts: list[int], data: st.DataObject
) -> None:
    """RUNTIME-5：与同批还有谁、从哪一步开始、先后次序都无关；位置不同的数不同。"""
    batch = len(starts)
    logits = np.random.default_rng(seed).standard_normal((6, batch, 30)).astype(np.float32)
    options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    together = Sampler(SamplingParams(**options, seed=seed), batch)  # type: ignore[arg-type]
    steps = data.draw(st.permutations(range(6)))
    picked = {step: together.sample(logits[step], np.array(starts) + step) for step in steps}
    for row, start in enumerate(starts):
        alone = Sampler(SamplingParams(**options, seed=seed + row), 1)  # type: ignore[arg-type]
        for step in range(3, 6):
            assert alone.sample(logits[step, row : row + 1], np.array([start + step])) == picked[step][row]


def test_streams_do_not_overlap() -> None:
    """种子、位置、用途任何一个不同，数就不同；连着取与分开取一样。"""
    drawn = {
        (seed, use, position): float(RowStream(seed).uniforms(use, position)[0])
        for seed in (0, 1, 2**64, 2**64 + 1)
        for use in Use
        for position in range(50)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(0 <= value < 1 for value in drawn.values())
    for use in Use:
        assert RowStream(1).uniforms(use, 7, 20).tolist() == [drawn[1, use, at] for at in range(7, 27)]
        assert RowStream(1).uniforms(use, 7, 0).size == 0
    assert RowStream(None).uniforms(Use.NEXT, 0) != RowStream(None).uniforms(Use.NEXT, 0)


def test_no_seed_differs_between_samplers() -> None:
    logits, positions = np.zeros((64, 1000), np.float32), np.zeros(64, np.int64)
    first, second = (Sampler(SamplingParams(temperature=1.0), 64).sample(logits, positions) for _ in range(2))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_same_probabilities_as_transformers(top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    chain = process.LogitsProcessorList([process.TemperatureLogitsWarper(0.8)])
    if top_k:
        chain.append(process.TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(process.TopPLogitsWarper(top_p))
    want = torch.softmax(chain(None, torch.tensor(logits)[None]), -1)[0].numpy()
    ids, probs = candidates(logits, SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p))
    got = np.zeros(50)
    got[ids] = probs
    assert got == pytest.approx(want, abs=1e-6)


class TestProcessors:
    """处理器在温度之前改 logits；没有处理器的行不受同批的影响。"""

    @staticmethod
    def forbid_last(scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        scores[tokens[-1]] = -np.inf
        return scores

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_only_its_own_row_changes(self, temperature: float) -> None:
        logits = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
        params, positions = SamplingParams(temperature=temperature, seed=3), np.array([5, 5])
        plain = [RowSampler(params) for _ in range(2)]
        want = pick_tokens(logits, positions, plain)
        guarded = [plain[0], RowSampler(params, processors=[self.forbid_last])]
        asked: list[int] = []

        def history(slot: int) -> list[int]:
            asked.append(slot)
            return [1, 2, int(want[1])]

        before = logits.copy()
        got = pick_tokens(logits, positions, guarded, history)
        assert got[0] == want[0]
        assert got[1] != want[1]
        assert asked == [1]
        np.testing.assert_array_equal(logits, before)
