"""生成与 teacher-forced logits：任何切块、任何批次都等于逐序列的 numpy 前向。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.errors import DsxError
from deepseek_export.runtime import BundleTokenizer, GenerationResult, Generator, ModelSession, SamplingParams
from deepseek_export.runtime.batching import right_padded_chunks
from tests.unit.test_runtime_tokenizer import byte_tokenizer
from tests.unit.test_runtime_toy import VOCAB, Toy, make_toy, save_toy

pytestmark = pytest.mark.unit

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1]]
LIMIT = 600


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy(LIMIT)


@pytest.fixture(scope="module")
def session(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    path = save_toy(toy, tmp_path_factory.mktemp("toy") / "model.onnx", external=True)
    return ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT))


def generator(session: ModelSession, eos: tuple[int, ...] = (), chunk: int = 512) -> Generator:
    return Generator(session, None, eos, prefill_chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 7, 11, 100])
def test_logits_do_not_depend_on_chunks_or_batch(toy: Toy, session: ModelSession, chunk: int | None) -> None:
    for prompts in (PROMPTS, PROMPTS[::-1], *([prompt] for prompt in PROMPTS)):
        for ids, got in zip(prompts, generator(session).logits(prompts, chunk), strict=True):
            assert got.shape == (len(ids), VOCAB)
            assert got.dtype == np.float32
            assert got == pytest.approx(toy.forward(ids), abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 4, 512])
def test_greedy_equals_recomputing_from_scratch(toy: Toy, session: ModelSession, chunk: int) -> None:
    result = generator(session, chunk=chunk).generate(PROMPTS, 12)
    assert result.token_ids == [toy.greedy(prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in result.token_ids}) > 1
    assert result.finish_reasons == ["length"] * 4
    assert result.prompt_lens == [11, 1, 4, 7]
    assert result.text is None


@pytest.mark.parametrize("split_kv", [False, True])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
def test_batch_equals_alone_for_every_cache_kind(
    toy: Toy, tmp_path_factory: pytest.TempPathFactory, cache_dtype: str, split_kv: bool
) -> None:
    path = save_toy(toy, tmp_path_factory.mktemp("toy") / "model.onnx", cache_dtype, split_kv=split_kv)
    made = generator(ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT)), chunk=4)
    together = made.generate(PROMPTS, 8).token_ids
    assert together == [made.generate([prompt], 8).token_ids[0] for prompt in PROMPTS]


def test_decode_across_a_bucket(toy: Toy, session: ModelSession) -> None:
    ids = np.random.default_rng(5).integers(0, VOCAB, 250).tolist()
    result = generator(session, chunk=64).generate([ids, ids[:9]], 12)
    assert result.token_ids == [toy.greedy(ids, 12), toy.greedy(ids[:9], 12)]


def test_each_row_stops_at_its_own_eos(toy: Toy, session: ModelSession) -> None:
    plain = [toy.greedy(prompt, 12) for prompt in PROMPTS]
    eos = plain[0][2]
    want = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in plain]
    assert len({len(ids) for ids in want}) > 1
    result = generator(session, eos=(eos, VOCAB + 5)).generate(PROMPTS, 12)
    assert result.token_ids == want
    assert result.finish_reasons == ["eos" if eos in ids else "length" for ids in plain]
    assert result.new_tokens == sum(map(len, want))
    assert generator(session, eos=(eos,)).generate(PROMPTS, 12, ignore_eos=True).token_ids == plain


def test_finished_rows_leave_the_batch(
    toy: Toy, session: ModelSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUNTIME-9：一行结束之后不再占一步的计算；别的行补上它的位置，token 不变。"""
    prompts = [[3, 1], [5], [9, 2, 6], [7, 7]]
    alone = [toy.greedy(prompt, 12) for prompt in prompts]
    eos = alone[0][2], alone[2][5]
    want = [ids[: next((i + 1 for i, t in enumerate(ids) if t in eos), 12)] for ids in alone]
    batches: list[int] = []
    run = session.run

    def spy(ids: np.ndarray, *rest: Any) -> np.ndarray:
        batches.append(len(ids))
        return run(ids, *rest)

    monkeypatch.setattr(session, "run", spy)
    seen: list[tuple[int, int]] = []
    result = generator(session, eos).generate(
        prompts, 12, on_token=lambda row, token: seen.append((row, token))
    )
    assert result.token_ids == want
    assert batches[1:] == [sum(len(ids) > step for ids in want) for step in range(1, max(map(len, want)))]
    assert [[token for at, token in seen if at == row] for row in range(4)] == want


def test_on_token_sees_every_token_in_order(session: ModelSession) -> None:
    seen: list[tuple[int, int]] = []
    result = generator(session).generate(PROMPTS, 3, on_token=lambda row, token: seen.append((row, token)))
    assert [row for row, _ in seen] == [0, 1, 2, 3] * 3
    assert [[t for r, t in seen if r == row] for row in range(4)] == result.token_ids


def test_sampling_seed_repeats_and_top_k_one_is_greedy(toy: Toy, session: ModelSession) -> None:
    made = generator(session)
    hot = SamplingParams(temperature=3.0, seed=11)
    first = made.generate(PROMPTS, 10, hot).token_ids
    assert first == made.generate(PROMPTS, 10, hot).token_ids
    assert first != made.generate(PROMPTS, 10, SamplingParams(temperature=3.0, seed=99)).token_ids
    alone = made.generate([PROMPTS[2]], 10, SamplingParams(temperature=3.0, seed=11 + 2)).token_ids[0]
    assert alone == first[2]
    single = made.generate(PROMPTS, 10, SamplingParams(temperature=3.0, top_k=1)).token_ids
    assert single == [toy.greedy(prompt, 10) for prompt in PROMPTS]


def test_rows_stop_at_the_position_limit(toy: Toy, session: ModelSession) -> None:
    ids = np.random.default_rng(6).integers(0, VOCAB, LIMIT).tolist()
    rows = [ids, ids[:-2], ids[:5]]
    result = generator(session).generate(rows, 4)
    assert result.token_ids == [[], toy.greedy(ids[:-2], 2), toy.greedy(ids[:5], 4)]
    assert result.finish_reasons == ["length"] * 3
    assert generator(session).generate([ids], 4).token_ids == [[]]


def test_text_comes_from_the_tokenizer(session: ModelSession) -> None:
    tokenizer = BundleTokenizer(byte_tokenizer(), {}, None)
    result = Generator(session, tokenizer, ()).generate(PROMPTS, 4)
    assert result.text == [tokenizer.decode(ids) for ids in result.token_ids]


def test_throughput_counts() -> None:
    result = GenerationResult([[1, 2, 3], [], [4]], None, [5, 6, 7], ["length"] * 3, 2.0, 0.5)
    assert (result.prompt_tokens, result.new_tokens, result.decode_tokens) == (18, 4, 2)
    assert result.decode_tokens_per_s == 4.0
    instant = GenerationResult([[1]], None, [1], ["length"], 0.0, 0.0)
    assert instant.decode_tokens_per_s == 0.0


def test_timings_are_measured(session: ModelSession) -> None:
    result = generator(session).generate(PROMPTS, 3)
    assert result.prefill_s > 0
    assert result.decode_s > 0


@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 100])
def test_chunks_cover_each_row_once_and_stay_in_capacity(chunk: int | None) -> None:
    rows = [np.array(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    seen: list[list[int]] = [[] for _ in rows]
    for part in right_padded_chunks(rows, chunk):
        assert (part.past_lens + part.input_ids.shape[1]).max() <= longest
        for row, count in enumerate(part.counts.tolist()):
            assert count == 0 or part.past_lens[row] == part.start == len(seen[row])
            assert count > 0 or part.past_lens[row] == len(rows[row])
            seen[row] += part.input_ids[row, :count].tolist()
    assert seen == PROMPTS


@pytest.mark.parametrize(
    ("prompts", "code", "named"),
    [
        ([], "DSX-E510", "列表"),
        ([[1], []], "DSX-E510", "第 1 条"),
        ([[1], [0] * (LIMIT + 1)], "DSX-E511", str(LIMIT + 1)),
        ([[1], [2, VOCAB]], "DSX-E509", rf"第 1 条提示词\[1\] = {VOCAB}"),
        ([[1 << 70]], "DSX-E509", rf"第 0 条提示词\[0\] = {1 << 70}"),
    ],
)
def test_refused_prompts(session: ModelSession, prompts: list[list[int]], code: str, named: str) -> None:
    for call in (lambda: generator(session).generate(prompts, 1), lambda: generator(session).logits(prompts)):
        with pytest.raises(DsxError, match=named) as caught:
            call()
        assert caught.value.code == code


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_refused_counts(session: ModelSession, bad: int) -> None:
    for name, call in {
        "max_new_tokens": lambda: generator(session).generate(PROMPTS, bad),
        "prefill_chunk": lambda: generator(session, chunk=bad),
        "chunk": lambda: generator(session).logits(PROMPTS, chunk=bad),
    }.items():
        with pytest.raises(DsxError, match=f"{name}={bad}") as caught:
            call()
        assert caught.value.code == "DSX-E512"
