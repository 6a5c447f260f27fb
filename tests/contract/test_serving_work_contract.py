"""SERVE-64：一个 token 的工作不随提示词与回答的长度。数的是一步里另占的内存，不是时间：抄一遍就露馅。"""

from __future__ import annotations

import statistics
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.runtime import ModelSession, SamplingParams
from deepseek_export.serving import Engine, EngineSettings, Request
from deepseek_export.serving.http.formats import Reading
from deepseek_export.serving.http.turn import Choice, Order
from tests.unit.test_runtime_tokenizer import config, write
from tests.unit.test_runtime_toy import VOCAB, make_toy, save_toy

pytestmark = pytest.mark.contract

LIMIT = 33_000
#: 处理器都看整条序列。
WATCHING = SamplingParams(temperature=0.9, seed=1, repetition_penalty=1.3, frequency_penalty=0.1, logprobs=2)
#: 一步允许多占的字节数：远小于把序列抄一遍（每个 token 八个字节）。
ALLOWED = 6_000


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ModelSession:
    path = save_toy(make_toy(LIMIT), tmp_path_factory.mktemp("toy") / "model.onnx", external=True)
    return ModelSession(OrtRunner(path, threads=1, max_positions=LIMIT))


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peaks(
    toy: ModelSession, prompt: int, new: int, each: Callable[[Request], object] | None = None
) -> list[int]:
    """每一步（连同 ``each``）最多另占了多少字节；缓存长大的那几步自然多，所以用的时候取中位数。"""
    found: list[int] = []
    before = 0

    def listen(request: Request) -> None:
        nonlocal before
        if each is not None:
            each(request)
        found.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]

    ids = np.random.default_rng(3).integers(0, VOCAB, prompt).tolist()
    with Engine(toy, (), EngineSettings(slots=1, prefill_tokens=4096)) as engine:
        engine.submit(ids, WATCHING, max_new_tokens=new, listener=listen).result()
    return found


def test_a_step_does_not_copy_the_prompt(toy, traced):
    """SERVE-64"""
    short, long = (statistics.median(peaks(toy, length, 40)[5:]) for length in (1_000, 32_000))
    assert long - short < ALLOWED


def test_a_step_does_not_copy_the_answer(toy, traced):
    """SERVE-64"""
    found = peaks(toy, 10, 3_000)
    assert statistics.median(found[-200:]) - statistics.median(found[100:300]) < ALLOWED


def test_text_is_read_once(toy, traced, tmp_path):
    """SERVE-64：从 token 到给客户端的段，每个字符只走一遍。"""
    tokenizer = write(tmp_path, config())
    order = Order([1], WATCHING, 3_000, stops=("no such thing",), reading=Reading(False))
    choice = Choice(0, order, tokenizer)
    given = []

    def advance(request: Request) -> None:
        choice.request = request
        piece = choice.advance()
        given.append(len(piece.text) if piece is not None else 0)

    found = peaks(toy, 10, 3_000, advance)
    assert sum(given) > 1_000
    assert statistics.median(found[-200:-1]) - statistics.median(found[100:300]) < ALLOWED
