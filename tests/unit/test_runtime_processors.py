"""处理器：与 transformers 的同名处理器相等，问的先后不改变结果；参数的范围；对数概率。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.errors import DsxError
from deepseek_export.history import History
from deepseek_export.runtime import BundleTokenizer, Generator, ModelSession, SamplingParams
from deepseek_export.runtime.logprobs import token_logprobs
from deepseek_export.runtime.processors import Penalties, row_processors
from deepseek_export.runtime.sampling import RowSampler, candidates, pick_tokens
from tests.unit.test_runtime_tokenizer import byte_tokenizer
from tests.unit.test_runtime_toy import VOCAB, make_toy, save_toy

pytestmark = pytest.mark.unit

PROMPT, GENERATED = [3, 1, 4, 1, 5], [9, 2, 6, 9, 9, 4]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    path = save_toy(make_toy(), tmp_path_factory.mktemp("toy") / "model.onnx")
    return ModelSession(OrtRunner(path, threads=1, max_positions=600))


def processed(session: ModelSession, logits: np.ndarray, tokens: list[int], **options: Any) -> np.ndarray:
    scores = logits.astype(np.float64)
    for processor in row_processors(SamplingParams(**options), len(PROMPT), {7}, session):
        scores = processor(scores, tokens)
    return scores


def logits_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("presence_penalty", 2.1),
        ("presence_penalty", True),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e9),
        ("min_tokens", -1),
        ("min_tokens", 1.0),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", "12"),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
    ],
)
def test_refused_params_name_the_key(key: str, value: object) -> None:
    with pytest.raises(DsxError, match=key) as caught:
        SamplingParams(**{key: value})  # type: ignore[arg-type]
    assert caught.value.code == "DSX-E504"
    assert key in caught.value.todo


class TestAgainstTransformers:
    """以 transformers 的实现为准。"""

    @staticmethod
    def oracle(name: str, *args: Any, **options: Any) -> Any:
        pytest.importorskip("torch")
        return getattr(pytest.importorskip("transformers.generation.logits_process"), name)(*args, **options)

    def check(self, oracle: Any, got: np.ndarray, logits: np.ndarray, tokens: list[int]) -> None:
        torch = pytest.importorskip("torch")
        want = oracle(torch.tensor([tokens]), torch.tensor(logits)[None].double())[0].numpy()
        np.testing.assert_allclose(got, want, rtol=1e-12)

    @pytest.mark.parametrize("penalty", [0.5, 1.3])
    def test_repetition(self, session: ModelSession, penalty: float) -> None:
        logits, tokens = logits_of(), PROMPT + GENERATED
        got = processed(session, logits, tokens, repetition_penalty=penalty)
        self.check(self.oracle("RepetitionPenaltyLogitsProcessor", penalty), got, logits, tokens)
        assert (got != logits.astype(np.float64)).sum() == len(set(tokens))

    @pytest.mark.parametrize("count", [0, 1, 2, 3])
    def test_min_new_tokens(self, session: ModelSession, count: int) -> None:
        logits, tokens = logits_of(), PROMPT + GENERATED[:count]
        oracle = self.oracle("MinNewTokensLengthLogitsProcessor", len(PROMPT), 2, 7)
        got = processed(session, logits, tokens, min_tokens=2)
        self.check(oracle, got, logits, tokens)
        assert np.isneginf(got[7]) == (count < 2)

    def test_bias(self, session: ModelSession) -> None:
        logits, bias = logits_of(), {2: -100.0, 5: 3.5}
        oracle = self.oracle("SequenceBiasLogitsProcessor", {(token,): add for token, add in bias.items()})
        self.check(oracle, processed(session, logits, PROMPT, logit_bias=bias), logits, PROMPT)

    @pytest.mark.parametrize("allowed", [(2,), (0, 7, 22)])
    def test_allowed(self, session: ModelSession, allowed: tuple[int, ...]) -> None:
        logits = logits_of()
        oracle = self.oracle("PrefixConstrainedLogitsProcessor", lambda batch, ids: list(allowed), 1)
        self.check(oracle, processed(session, logits, PROMPT, allowed_token_ids=allowed), logits, PROMPT)

    @pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (5, 0.7)])
    def test_min_p(self, min_p: float, top_k: int, top_p: float) -> None:
        torch = pytest.importorskip("torch")
        chain = [self.oracle("TemperatureLogitsWarper", 0.8), self.oracle("MinPLogitsWarper", min_p)]
        chain += [self.oracle("TopKLogitsWarper", top_k)] if top_k else []
        chain += [self.oracle("TopPLogitsWarper", top_p)] if top_p < 1 else []
        logits = logits_of(3) * 2
        scores = torch.tensor(logits)[None].double()
        for warper in chain:
            scores = warper(None, scores)
        ids, probs = candidates(
            logits, SamplingParams(temperature=0.8, min_p=min_p, top_k=top_k, top_p=top_p)
        )
        got = np.zeros(VOCAB)
        got[ids] = probs
        np.testing.assert_allclose(got, torch.softmax(scores, -1)[0].numpy(), atol=1e-12)


def test_presence_and_frequency_count_the_generated_only(session: ModelSession) -> None:
    """OpenAI 的定义：减去 次数 x frequency + (出现过) x presence；提示词里的不算。"""
    logits = logits_of()
    got = processed(session, logits, PROMPT + GENERATED, frequency_penalty=0.5, presence_penalty=-0.25)
    want = logits.astype(np.float64)
    for token in set(GENERATED):
        want[token] -= 0.5 * GENERATED.count(token) - 0.25
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_bias_comes_before_the_penalties(session: ModelSession) -> None:
    """与 vLLM 同序：先加偏置，重复惩罚按加过之后的正负来罚。"""
    logits = np.full(VOCAB, -1.0, np.float32)
    got = processed(
        session, logits, [*PROMPT, 9], logit_bias={9: 3.0}, repetition_penalty=2.0, presence_penalty=0.5
    )
    assert got[9] == (-1.0 + 3.0) / 2.0 - 0.5


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=12))
def test_the_order_of_asking_does_not_matter(asked: list[list[int]]) -> None:
    """RUNTIME-13：验证草稿时会退回去、换一个草稿再问；结果与头一次就问它一样。"""
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.7, presence_penalty=0.3)
    used = Penalties(params, 3)
    for tokens in asked:
        logits = logits_of(len(tokens)).astype(np.float64)
        np.testing.assert_array_equal(
            used(logits.copy(), tokens), Penalties(params, 3)(logits.copy(), tokens)
        )


def test_ids_outside_the_vocabulary_are_refused(session: ModelSession) -> None:
    for options in ({"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": [1, VOCAB]}):
        with pytest.raises(DsxError, match=next(iter(options))) as caught:
            row_processors(SamplingParams(**options), 1, (), session)  # type: ignore[arg-type]
        assert caught.value.code == "DSX-E509"


def test_nothing_to_choose_is_refused(session: ModelSession) -> None:
    """只许结束又不许结束当场拒绝；到选的时候才知道的，那时说。"""
    with pytest.raises(DsxError, match="min_tokens=3") as caught:
        row_processors(SamplingParams(allowed_token_ids=[7], min_tokens=3), 1, {7}, session)
    assert caught.value.code == "DSX-E518"

    def nothing(scores: np.ndarray, tokens: Any) -> np.ndarray:
        return np.full_like(scores, -np.inf)

    rows = [RowSampler(SamplingParams()), RowSampler(SamplingParams(), processors=[nothing])]
    with pytest.raises(DsxError, match="DSX-E518"):
        pick_tokens(np.stack([logits_of()] * 2), np.array([4, 4]), rows)


class TestGenerator:
    """处理器经过生成器：每行只看自己的序列。"""

    PROMPTS = ([3, 1, 4, 1, 5, 9], [8], [2, 7, 1])

    def test_batch_equals_stepping_by_hand(self, session: ModelSession) -> None:
        """RUNTIME-13：与逐 token 从头重算、再用 transformers 的处理器改过之后取最大的相同；与同批还有谁无关。"""
        torch = pytest.importorskip("torch")
        process = pytest.importorskip("transformers.generation.logits_process")
        made, params = Generator(session, None, ()), SamplingParams(repetition_penalty=2.5)
        oracle = process.RepetitionPenaltyLogitsProcessor(2.5)
        got = made.generate(self.PROMPTS, 10, params).token_ids
        assert got != made.generate(self.PROMPTS, 10).token_ids
        for prompt, ids in zip(self.PROMPTS, got, strict=True):
            tokens = list(prompt)
            for token in ids:
                last = torch.tensor(make_toy().forward(tokens)[-1])[None]
                assert int(oracle(torch.tensor([tokens]), last).argmax()) == token
                tokens.append(token)
            assert made.generate([prompt], 10, params).token_ids == [ids]

    def test_min_tokens_delays_eos_and_stop_strings(self, session: ModelSession) -> None:
        tokenizer = BundleTokenizer(byte_tokenizer(), {}, None)
        free = Generator(session, None, ()).generate(self.PROMPTS[:1], 10).token_ids[0]
        eos = free[2]
        made = Generator(session, tokenizer, (eos,))
        assert len(made.generate(self.PROMPTS[:1], 10).token_ids[0]) == free.index(eos) + 1
        kept = made.generate(self.PROMPTS[:1], 10, SamplingParams(min_tokens=6)).token_ids[0]
        assert eos not in kept[:6]
        assert len(kept) >= 6
        with pytest.raises(DsxError, match="min_tokens=6") as caught:
            made.generate(self.PROMPTS[:1], 5, SamplingParams(min_tokens=6))
        assert caught.value.code == "DSX-E512"
        text = tokenizer.decode(free)
        made = Generator(session, tokenizer, ())
        for stop, min_tokens in ((text[2:4], 0), (text[2:4], 3), (text[8:], 8)):
            stopped = made.generate(self.PROMPTS[:1], 10, SamplingParams(min_tokens=min_tokens), stop=[stop])
            assert stopped.text == [
                text[: text.index(stop, min_tokens)] if stop in text[min_tokens:] else text
            ]

    def test_logprobs_are_those_of_the_raw_logits(self, session: ModelSession) -> None:
        """RUNTIME-14：在惩罚与温度之前；选出来的 token 不在最可能的几个里也给它的。"""
        params = SamplingParams(temperature=3.0, seed=5, repetition_penalty=1.5, logprobs=3)
        result = Generator(session, None, ()).generate(self.PROMPTS, 8, params)
        assert result.logprobs is not None
        for prompt, ids, logprobs in zip(self.PROMPTS, result.token_ids, result.logprobs, strict=True):
            assert [one.token for one in logprobs] == ids
            logits = make_toy().forward([*prompt, *ids])[len(prompt) - 1 : -1].astype(np.float64)
            want = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            for row, one in zip(want, logprobs, strict=True):
                assert one.logprob == pytest.approx(row[one.token], abs=1e-4)
                assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:3].tolist()
                assert [value for _, value in one.top] == pytest.approx(np.sort(row)[:-4:-1], abs=1e-4)
        assert Generator(session, None, ()).generate(self.PROMPTS, 1).logprobs is None


def test_no_candidates_give_only_the_chosen_one() -> None:
    one = token_logprobs(np.array([0.0, 0.0, -np.inf], np.float32), 1, 0)
    assert (one.top, one.logprob) == ((), pytest.approx(-np.log(2)))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_following_a_history_equals_counting_afresh(data):
    """一条会接上草稿、退掉草稿的序列，中间还问过别的序列：每次都与从头数的相同。"""
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2)
    token = st.integers(0, VOCAB - 1)
    history = History(data.draw(st.lists(token, min_size=1, max_size=5)))
    start = len(history)
    followed = Penalties(params, start)
    for _ in range(data.draw(st.integers(1, 12))):
        history.drop_drafts()
        if data.draw(st.booleans()):
            history.confirm(data.draw(st.lists(token, min_size=1, max_size=3)))
        for draft in data.draw(st.lists(token, max_size=3)):
            history.append(draft)
        other = data.draw(st.sampled_from([None, [1], [*history, 2], history[:-1]]))
        for asked in (other, history):
            if asked is not None:
                got = followed(logits_of().astype(np.float64), asked)
                want = Penalties(params, start)(logits_of().astype(np.float64), list(asked))
                assert np.array_equal(got, want)
