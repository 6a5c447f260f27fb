"""specs/serving 的 SERVE-20 以后：采样的参数、对数概率与 echo，经过 HTTP 与从 Python 里相同。"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import deepseek_export
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import SamplingParams, TokenLogprobs
from tests.serving_http import CHAT, NAME, TEXT, Running, alone, events, loader

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> CompiledModel:
    """对照：不经过服务。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture(scope="module")
def server(trained_bundle: Path) -> Iterator[Running]:
    """四个 slot。"""
    with Running(loader(trained_bundle, slots=4, queue=64)) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """官方的客户端，不重试。"""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


TUNED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.75,
    "repetition_penalty": 1.3,
    "min_p": 0.02,
    "min_tokens": 6,
    "temperature": 0.8,
    "top_p": 0.95,
}


def test_one_sampler_for_http_and_python(server: Running, model: CompiledModel):
    """SERVE-21、RUNTIME-13：惩罚、偏置、min-p、最少长度、许可，与生成器的相同。"""
    prompt, bias = "《秋思》陆游\n", {model.encode("月")[-1]: 2.5}
    allowed = sorted({*model.encode("明月松间照，清泉石上流。春眠不觉晓"), *bias})
    for extra in ({}, {"allowed_token_ids": allowed}):
        body = {
            "prompt": prompt,
            "max_tokens": 12,
            "seed": 3,
            "n": 2,
            "logit_bias": {str(k): v for k, v in bias.items()},
        }
        got = server.post("/v1/completions", body | TUNED | extra).json()["choices"]
        for number, choice in enumerate(got):
            params = SamplingParams(seed=3 + number, logit_bias=bias, **TUNED, **extra)
            want = model.generator.generate([model.encode(prompt)], 12, params)
            assert [choice["text"]] == want.text
    plain = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "seed": 3} | TUNED).json()
    assert plain["choices"][0]["text"] != got[0]["text"]


def scored(model: CompiledModel, ids: list[int], **options) -> tuple[str, list[TokenLogprobs]]:
    result = model.generator.generate([ids], options.pop("max_new_tokens"), SamplingParams(**options))
    assert result.text is not None
    assert result.logprobs is not None
    return result.text[0], result.logprobs[0]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, model: CompiledModel, stream: bool):
    """SERVE-29：各 token 的字节接起来就是回答；数值与生成器的相同，在惩罚与温度之前。"""
    options = {"temperature": 0.7, "seed": 5, "presence_penalty": 0.5}
    text, want = scored(
        model, model.encode(CHAT[0]["content"], chat=True), max_new_tokens=12, logprobs=3, **options
    )
    got = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=12, logprobs=True, top_logprobs=3, stream=stream, **options
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in got]
        content = "".join(chunk.delta.content or "" for chunk in chunks)
        entries = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content or ()]
    else:
        content, entries = got.choices[0].message.content, got.choices[0].logprobs.content
    assert content == text
    assert b"".join(bytes(one.bytes) for one in entries).decode("utf-8", "replace") == text
    assert len(entries) == 12
    for one, expected in zip(entries, want, strict=True):
        assert one.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            [v for _, v in expected.top], abs=1e-3
        )
        assert bytes(one.bytes) == model.tokenizer.bytes_of(expected.token)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(server: Running, model: CompiledModel, stream: bool):
    """SERVE-29：``text_offset`` 指着文本里的位置，跨几个 token 的字它们都指着它的开头；选出来的总在候选里。"""
    prompt = "《秋思》陆游\n"
    for cut, stop in ((20, None), (20, "，"), (9, None)):
        _, want = scored(model, model.encode(prompt), max_new_tokens=cut, logprobs=2)
        body = {"prompt": prompt, "max_tokens": cut, "temperature": 0, "logprobs": 2, "stop": stop}
        got = server.post("/v1/completions", body | {"stream": stream})
        choices = [chunk["choices"][0] for chunk in (events(got.text) if stream else [got.json()])]
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        columns = {name: [one for part in parts for one in part[name]] for name in parts[0]}
        rows = list(
            zip(
                *(columns[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")),
                strict=True,
            )
        )
        assert len(rows) == cut if stop is None else 0 < len(rows) < cut
        for (token, logprob, top, offset), expected in zip(rows, want, strict=False):
            assert logprob == pytest.approx(expected.logprob, abs=1e-3)
            assert top[token] == logprob
            assert 2 <= len(top) <= 3
            if not token.startswith("bytes:"):
                assert text[offset : offset + len(token)] == token[: len(text) - offset]
        offsets = columns["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
        assert offsets[-1] < len(text)


def test_bytes_of_a_character_over_several_tokens(server: Running):
    """SERVE-29：半个字的 token 写得出来，字节接起来仍是那个字。"""
    body = {"prompt": "《秋思》陆游\n", "temperature": 0, "max_tokens": 40, "logprobs": 0}
    got = server.post("/v1/completions", body).json()["choices"][0]
    partial = [token for token in got["logprobs"]["tokens"] if token.startswith("bytes:")]
    whole = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token in partial else token.encode()
        for token in got["logprobs"]["tokens"]
    )
    assert whole.decode("utf-8", "replace") == got["text"]
    assert all(len(top) == 1 for top in got["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Running, model: CompiledModel, stream: bool):
    """SERVE-21：``echo`` 把提示词放在前面，停止串不在提示词里找；没有提示词的对数概率，不能一起给。"""
    body = {
        "prompt": TEXT,
        "max_tokens": 4,
        "temperature": 0,
        "echo": True,
        "stop": TEXT[0],
        "stream": stream,
    }
    got = server.post("/v1/completions", body)
    text = "".join(chunk["choices"][0]["text"] for chunk in (events(got.text) if stream else [got.json()]))
    assert text == TEXT + alone(model, TEXT, max_new_tokens=4, stop=TEXT[0])
    refused = server.post("/v1/completions", body | {"logprobs": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")
