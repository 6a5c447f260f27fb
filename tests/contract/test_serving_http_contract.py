"""specs/serving 的 SERVE-20 以后：OpenAI 兼容的 HTTP，用官方的客户端与裸的 httpx。"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import openai
import pytest

import deepseek_export
from deepseek_export.model import CompiledModel
from tests.serving_http import CHAT, LONG, NAME, TEXT, Running, Scripted, alone, events, loader, opened, until

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


@pytest.fixture(scope="module")
def narrow(trained_bundle: Path) -> Iterator[Running]:
    """一个 slot，排一个；注释发得很勤。"""
    with Running(loader(trained_bundle, slots=1, queue=1), keep_alive_s=0.02) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """官方的客户端，不重试。"""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


# SERVE-20


def test_models(client: openai.OpenAI):
    """SERVE-20"""
    (card,) = client.models.list().data
    assert card.id == client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_equals_the_generator(client: openai.OpenAI, model: CompiledModel):
    """SERVE-20：整个的与流式的，文本都与生成器的相同。"""
    want = alone(model, CHAT[0]["content"], chat=True, max_new_tokens=20)
    whole = client.chat.completions.create(model=NAME, messages=CHAT, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == want
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    stream = client.chat.completions.create(
        model=NAME, messages=CHAT, temperature=0, max_completion_tokens=20, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]


def test_completions_of_texts_and_tokens(client: openai.OpenAI, model: CompiledModel):
    """SERVE-20：一条文本、几条文本、token id；没有给 ``max_tokens`` 就是 16 个。"""
    prompts = [TEXT, "春"]
    want = [alone(model, prompt, max_new_tokens=16) for prompt in prompts]
    got = client.completions.create(model=NAME, prompt=prompts, temperature=0)
    assert [choice.text for choice in got.choices] == want
    ids = [model.encode(prompt) for prompt in prompts]
    got = client.completions.create(model=NAME, prompt=ids, temperature=0)
    assert [choice.text for choice in got.choices] == want
    got = client.completions.create(model=NAME, prompt=ids[1], temperature=0)
    assert [choice.text for choice in got.choices] == want[1:]
    stream = client.completions.create(model=NAME, prompt=prompts, temperature=0, stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == want


def test_many_at_once_give_what_each_gives_alone(server: Running, model: CompiledModel):
    """SERVE-20：一半贪心、一半带种子，整个的与流式的混着来；之后什么也不剩。"""
    asks = [
        {
            "prompt": prompt,
            "max_tokens": 8 + 3 * number,
            "temperature": (number % 2) * 0.8,
            "seed": number,
            "stream": number % 3 == 0,
        }
        for number, prompt in enumerate([TEXT, "春眠", "And God said", "《论语》\n子曰", "明月", "床前"] * 2)
    ]
    want = [
        alone(
            model,
            ask["prompt"],
            max_new_tokens=ask["max_tokens"],
            temperature=ask["temperature"],
            seed=ask["seed"],
        )
        for ask in asks
    ]
    server.idle()
    tasks = server.tasks()

    def answer(ask: dict) -> str:
        with httpx.Client(timeout=60) as one:
            got = one.post(f"{server.url}/v1/completions", json=ask)
        if not ask["stream"]:
            return got.json()["choices"][0]["text"]
        return "".join(chunk["choices"][0]["text"] for chunk in events(got.text))

    with ThreadPoolExecutor(len(asks)) as pool:
        assert list(pool.map(answer, asks)) == want
    server.idle()
    until(lambda: server.tasks() <= tasks)


def test_tokenize_and_detokenize(server: Running, model: CompiledModel):
    """SERVE-20"""
    ids = model.encode("明月")
    assert server.post("/tokenize", {"prompt": "明月"}).json() == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 2048,
    }
    assert server.post("/tokenize", {"messages": CHAT}).json()["tokens"] == model.encode(
        CHAT[0]["content"], chat=True
    )
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "明月"}
    for body in ({"tokens": [768]}, {"tokens": [-1]}, {"tokens": [1 << 40]}, {"tokens": ["1"]}, {}):
        assert server.post("/detokenize", body).status_code == 400
    assert server.post("/tokenize", {}).json()["error"]["param"] == "prompt"
    assert server.get("/version").json() == {"version": deepseek_export.__version__}


# SERVE-21


def test_n_choices_are_rows_of_one_batch(server: Running, model: CompiledModel):
    """SERVE-21：第 i 个回答的种子是 ``seed + i``；提示词只算一次用量。"""
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    want = [alone(model, TEXT, seed=7 + index, **options) for index in range(3)]
    body = {
        "prompt": TEXT,
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
    }
    got = server.post("/v1/completions", body).json()
    assert [choice["text"] for choice in got["choices"]] == want
    assert got["usage"]["prompt_tokens"] == len(model.encode(TEXT))
    assert got["usage"]["completion_tokens"] == 36


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_never_show(server: Running, model: CompiledModel, stream: bool):
    """SERVE-21：停止串之前的都给出来，它自己一个字也不露；跨着 token 的也是。"""
    whole = alone(model, TEXT, max_new_tokens=40)
    stop = whole[20:27]
    body = {"prompt": TEXT, "max_tokens": 40, "temperature": 0, "stop": ["\x00never", stop], "stream": stream}
    got = server.post("/v1/completions", body)
    choices = [event["choices"][0] for event in events(got.text)] if stream else got.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"
    server.idle()


def test_stop_tokens_and_eos(server: Running, model: CompiledModel):
    """SERVE-21：``stop_token_ids`` 停在那个 token，它不在文本里；``ignore_eos`` 不停。"""
    ids = model.generate([model.encode(TEXT)], max_new_tokens=20).token_ids[0]
    at = next(at for at in range(8, 20) if ids[at] not in ids[:at])
    body = {"prompt": TEXT, "max_tokens": 20, "temperature": 0, "stop_token_ids": [ids[at]]}
    got = server.post("/v1/completions", body).json()
    assert model.tokenizer is not None
    assert got["choices"][0]["text"] == model.tokenizer.decode(ids[:at])
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == at + 1
    poem = model.generate(CHAT[0]["content"], chat=True, max_new_tokens=200)
    assert poem.finish_reasons == ["eos"]
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 200}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["finish_reason"] == "stop"
    body |= {"ignore_eos": True}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", True),
        ("length_penalty", 0.5),
        ("prompt_logprobs", 1),
        ("reasoning_effort", "high"),
        ("documents", [{"text": "x"}]),
        ("functions", [{"name": "f"}]),
    ],
)
def test_known_but_unsupported_fields_are_refused_by_name(server: Running, field: str, value: object):
    """SERVE-21"""
    got = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, field: value})
    assert got.status_code == 400
    assert got.json()["error"]["param"] == field
    assert field in got.json()["error"]["message"]


def test_harmless_values_and_unknown_fields_are_accepted(client: openai.OpenAI):
    """SERVE-21：不改变结果的值可以给；不认得的字段不理会。"""
    got = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "春"}]},
        ],
        max_tokens=1,
        n=1,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        frequency_penalty=0,
        logit_bias={},
        tool_choice="auto",
        user="someone",
        store=False,
        metadata={"a": "b"},
        extra_body={"top_k": -1, "min_p": 0, "not_a_field": 1},
    )
    assert got.choices[0].finish_reason == "length"


# SERVE-22


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls.0"),
        ({"messages": CHAT, "temperature": "hot"}, "temperature"),
        ({"messages": CHAT, "temperature": -1}, None),
        ({"messages": CHAT, "top_p": 0}, None),
        ({"messages": CHAT, "min_p": 2}, None),
        ({"messages": CHAT, "presence_penalty": 3}, None),
        ({"messages": CHAT, "repetition_penalty": 0}, None),
        ({"messages": CHAT, "min_tokens": 5, "max_tokens": 4}, None),
        ({"messages": CHAT, "logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"messages": CHAT, "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": CHAT, "logit_bias": {"1": 101}}, None),
        ({"messages": CHAT, "allowed_token_ids": [999999]}, "allowed_token_ids"),
        ({"messages": CHAT, "allowed_token_ids": []}, None),
        ({"messages": CHAT, "logprobs": 1}, "logprobs"),
        ({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": CHAT, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": CHAT, "seed": -1}, None),
        ({"messages": CHAT, "stop": ""}, None),
        ({"messages": CHAT, "stop": [1]}, "stop"),
        ({"messages": CHAT, "max_tokens": 0}, "max_tokens"),
        ({"messages": CHAT, "n": 0}, "n"),
        ({"messages": CHAT, "n": 100}, "n"),
        ({"messages": CHAT, "stream": "yes"}, "stream"),
        ({"messages": CHAT, "stream_options": {}}, "stream_options"),
        ({"messages": CHAT, "stop_token_ids": [768]}, "stop_token_ids"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, "messages"),
    ],
)
def test_bad_fields(server: Running, body: dict, param: str | None):
    """SERVE-22：400，格式是 OpenAI 的，写着是哪个字段；一个 token 也没有算。"""
    before = server.engine.stats.prompt_tokens
    got = server.post("/v1/chat/completions", body)
    assert got.status_code == 400
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert server.engine.stats.prompt_tokens == before


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": NaN}', "application/json"),
        (b'{"prompt": "x", "temperature": NaN}', "application/json"),
        (b'{"prompt": [1, 99999999999999999999]}', "application/json"),
        (b'{"prompt": "x"}', "text/plain"),
    ],
)
def test_malformed_bodies(server: Running, content: bytes, kind: str):
    """SERVE-22：网页不经预检就能发的 ``text/plain`` 也不收。"""
    got = server.client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


def test_one_prompt_too_long_refuses_all_before_any_compute(server: Running):
    """SERVE-22：前面的也没有算；客户端认得的名字是 ``context_length_exceeded``。"""
    server.idle()
    before = server.engine.stats
    got = server.post("/v1/completions", {"prompt": [[5, 6], [7] * 2049], "max_tokens": 4})
    assert got.status_code == 400
    assert got.json()["error"]["code"] == "context_length_exceeded"
    assert server.engine.stats == before


def test_other_paths_and_models(server: Running):
    """SERVE-22：也是同样的格式。"""
    assert server.get("/nope").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405
    got = server.post("/v1/completions", {"prompt": "x", "model": "gpt-4"})
    assert (got.status_code, got.json()["error"]["code"]) == (404, "model_not_found")
    odd = {"content": b'{"prompt": "x", "model": "\\ud800"}', "headers": {"content-type": "application/json"}}
    assert server.client.post("/v1/completions", **odd).status_code == 404


def test_a_full_queue_is_503_with_retry_after(narrow: Running):
    """SERVE-22：在做的、排队的各一个，再来的当场拒绝；走了一个就又收得下。"""
    with narrow.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as first:
        lines = first.iter_lines()  # 留着：迭代器没有了，连接就断了
        next(lines)
        with narrow.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}):
            until(lambda: narrow.engine.stats.waiting == 1)
            refused = narrow.post("/v1/completions", LONG)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "DSX-E530"
    narrow.idle()
    assert narrow.post("/v1/completions", {"prompt": TEXT, "max_tokens": 1}).status_code == 200


def test_empty_prompts_and_prompts_that_leave_no_room(server: Running):
    """SERVE-22：空的 400；恰好占满的答得出来，是空的，``length``。"""
    for prompt in ([], [[]]):
        got = server.post("/v1/completions", {"prompt": prompt})
        assert (got.status_code, got.json()["error"]["param"]) == (400, "prompt")
    got = server.post("/v1/completions", {"prompt": [7] * 2048, "max_tokens": 4}).json()
    assert got["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert got["usage"]["completion_tokens"] == 0
    got = server.post("/v1/completions", {"prompt": [7] * 2046, "max_tokens": 4}).json()
    assert got["usage"]["completion_tokens"] == 2


# SERVE-28


def test_reasoning_comes_apart_from_the_answer(trained_bundle: Path):
    """SERVE-28：两个名字都有；流式的拼起来相同；续写原样给出。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    assert model.tokenizer is not None
    text = "<think>\n先想想：1 < 2\n</think>\n\n不学。"
    ids = model.encode(text)[1:]  # 不要 bos
    asked = {"messages": CHAT, "temperature": 0, "max_tokens": len(ids)}
    prompt = model.encode(CHAT[0]["content"], chat=True)
    with Running(lambda: opened(model)) as running:
        spoken = Scripted(model.session.run, len(prompt), ids)
        with mock.patch.object(model.session, "run", spoken):
            whole = running.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
            stream = events(running.post("/v1/chat/completions", asked | {"stream": True}).text)
            plain = {"prompt": prompt, "temperature": 0, "max_tokens": len(ids)}
            completion = running.post("/v1/completions", plain).json()["choices"][0]["text"]
    assert completion == text
    assert whole["content"] == "不学。"
    assert whole["reasoning_content"] == whole["reasoning"] == "先想想：1 < 2\n"
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]
    for key, want in whole.items():
        if key not in ("role", "refusal"):
            assert "".join(delta.get(key, "") for delta in deltas) == want
