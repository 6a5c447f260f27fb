"""specs/serving 的工具调用，用官方的 openai 客户端与 LangChain。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

import deepseek_export
from deepseek_export.formats.calls import ToolCall
from deepseek_export.formats.chat import TOOL_FORMATS
from deepseek_export.model import CompiledModel
from deepseek_export.serving.http.formats import ModelFormats
from deepseek_export.serving.http.problems import ApiError
from tests.serving_http import CHAT, NAME, Running, Scripted, events, loader, opened
from tests.serving_schemas import NOW, PERSON, WEATHER, Person, chat_request

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> CompiledModel:
    """不开服务，只用它的分词器。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture(scope="module")
def server(trained_bundle: Path) -> Iterator[Running]:
    """四个 slot；演示模型的模板不认得工具，格式由 ``--tool-parser`` 指定。"""
    with Running(loader(trained_bundle, slots=4, queue=64, tool_parser="deepseek_v31")) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """官方的客户端，不重试。"""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


def test_required_and_named_tools_through_the_client(client: openai.OpenAI):
    """SERVE-41：必须调用的一定调用，参数合乎 schema；流式的碎片接起来是 JSON；结束的原因是 ``tool_calls``。"""
    asked = {"model": NAME, "messages": CHAT, "tools": [WEATHER, NOW], "temperature": 1, "seed": 2}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice, single in ((named, True), ("required", False)):
        options = {**asked, "tool_choice": choice, "parallel_tool_calls": not single}
        (whole,) = client.chat.completions.create(**options).choices
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content is None
        calls = whole.message.tool_calls
        assert calls
        for call in calls:
            values = json.loads(call.function.arguments)
            if call.function.name == "get_weather":
                assert values["city"] in ("杭州", "北京")
                assert 1 <= values["days"] <= 7
        if single:
            assert [call.function.name for call in calls] == ["get_weather"]
        chunks = list(client.chat.completions.create(**options, stream=True))
        joined: dict[int, list[str]] = {}
        for delta in (chunk.choices[0].delta for chunk in chunks):
            for one in delta.tool_calls or ():
                assert (one.id is None) == (one.index in joined)
                joined.setdefault(one.index, [one.function.name or "", ""])[1] += one.function.arguments or ""
        assert [tuple(one) for one in joined.values()] == [
            (call.function.name, call.function.arguments) for call in calls
        ]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_langchain(server: Running):
    """SERVE-41：绑定工具、结构化的输出、流式，都不必改。"""
    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key=SecretStr("x"), model=NAME, max_retries=0)
    bound = chat.bind_tools([WEATHER], tool_choice="get_weather")
    answer = bound.invoke("天气？")
    assert [call["name"] for call in answer.tool_calls] == ["get_weather"]
    assert answer.tool_calls[0]["args"]["city"] in ("杭州", "北京")
    whole = None
    for chunk in bound.stream("天气？"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.tool_calls[0]["name"] == "get_weather"
    for method in ("json_schema", "function_calling"):
        person = chat.with_structured_output(Person, method=method).invoke("谁？")
        assert isinstance(person, Person)


def spoken_answer(
    trained_bundle: Path, name: str, text: str, body: dict, template: str | None = None
) -> list[dict]:
    """模型照 ``text`` 说：``[整个的回答, *流式的各块]``。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    assert model.tokenizer is not None
    if template is not None:
        model.tokenizer.chat_template = template
    asked = {"messages": CHAT, "temperature": 0, **body}
    with Running(lambda: opened(model, tool_parser=name)) as running:
        ids = [*model.encode(text)[1:], 1]
        prompt = running.served.chat_orders(chat_request(asked))[0].prompt
        with mock.patch.object(model.session, "run", Scripted(model.session.run, len(prompt), ids)):
            whole = running.post("/v1/chat/completions", asked).json()
            stream = events(running.post("/v1/chat/completions", asked | {"stream": True}).text)
    return [whole, *stream]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_of_every_format_come_out_of_the_text(trained_bundle: Path, name: str):
    """SERVE-41、SERVE-42：自己决定调用的也读得出来，正文在前；不许几次的，头一次完了就停。"""
    calls = [
        ToolCall("", "get_weather", '{"city": "杭州", "days": 3}'),
        ToolCall("", "get_weather", '{"city": "北京", "days": 1}'),
    ]
    text = "我查。" + TOOL_FORMATS[name].encode(calls)
    whole, *stream = spoken_answer(trained_bundle, name, text, {"tools": [WEATHER]})
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "我查。"
    made = choice["message"]["tool_calls"]
    assert [json.loads(one["function"]["arguments"]) for one in made] == [call.values for call in calls]
    assert len({one["id"] for one in made}) == 2
    joined = ["", ""]
    for chunk in stream:
        for one in chunk["choices"][0]["delta"].get("tool_calls", ()):
            joined[one["index"]] += one["function"]["arguments"]
    assert joined == [one["function"]["arguments"] for one in made]
    body = {"tools": [WEATHER], "parallel_tool_calls": False}
    single, *_ = spoken_answer(trained_bundle, name, text, body)
    assert [one["function"]["arguments"] for one in single["choices"][0]["message"]["tool_calls"]] == joined[
        :1
    ]
    assert single["choices"][0]["finish_reason"] == "tool_calls"
    assert single["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    none, *_ = spoken_answer(trained_bundle, name, text, {"tools": [WEATHER], "tool_choice": "none"})
    assert none["choices"][0]["message"]["content"].startswith("我查。")
    assert "tool_calls" not in none["choices"][0]["message"]


def test_strict_tools_hold_even_when_calling_is_optional(trained_bundle: Path):
    """SERVE-41：有 ``strict`` 的工具，想调用就得合乎 schema，不想调用照常说话。"""
    strict = json.loads(json.dumps(WEATHER))
    strict["function"]["strict"] = True
    style = TOOL_FORMATS["deepseek_v31"]
    bad = style.encode([ToolCall("", "get_weather", '{"city": "上海", "days": 3}')])
    whole, *_ = spoken_answer(
        trained_bundle, style.name, "查：" + bad, {"tools": [strict], "max_tokens": 200}
    )
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("杭州", "北京")
    whole, *_ = spoken_answer(trained_bundle, style.name, "不必查。", {"tools": [strict]})
    assert whole["choices"][0]["message"]["content"] == "不必查。"
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_a_schema_and_tools_together(trained_bundle: Path):
    """SERVE-40、SERVE-41：要么调用工具，要么照 schema 说。"""
    style = TOOL_FORMATS["deepseek_v31"]
    wanted = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    asked = {"tools": [WEATHER], "response_format": wanted}
    call = style.encode([ToolCall("", "get_weather", '{"city": "杭州", "days": 3}')])
    whole, *_ = spoken_answer(trained_bundle, style.name, call, asked)
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    said = '{"name": "孔子", "age": 72}'
    whole, *_ = spoken_answer(trained_bundle, style.name, said, asked)
    assert whole["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize(
    "odd",
    [
        {"properties": [1]},
        {"properties": {"a": 1, "b": {"enum": 3}, "c": {"type": 5}, "d": {"minLength": "x"}}, "required": 7},
        {"properties": {"a": {"pattern": "("}}, "required": ["a"]},
        {"type": "string"},
    ],
)
def test_odd_parameters_are_the_clients_mistake(model: CompiledModel, name: str, odd: dict):
    """SERVE-41：写坏的 schema 是 400，或照能读懂的部分生成；服务从不内部出错。"""
    assert model.tokenizer is not None
    formats = ModelFormats(model.tokenizer, model.session.vocab_size, [1], name)
    tool = {"type": "function", "function": {"name": "f", "parameters": odd}}
    body = chat_request({"messages": CHAT, "tools": [tool], "tool_choice": "required"})
    with suppress(ApiError):
        assert formats.grammar(None, body, "x") is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [NOW], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"pattern": "a" * 5000}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {
                "messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}, *CHAT],
                "chat_template_kwargs": {"messages": 1},
            },
            "chat_template_kwargs",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "["}}],
                    }
                ]
            },
            "messages",
        ),
    ],
)
def test_bad_tools(server: Running, fields: dict, param: str):
    """SERVE-41：400，写着是哪个字段。"""
    got = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, **fields})
    assert (got.status_code, got.json()["error"]["param"]) == (400, param), got.text


def test_a_model_of_unknown_format_refuses_tools(trained_bundle: Path):
    """SERVE-41：看不出格式的不假装。"""
    with Running(loader(trained_bundle)) as running:
        got = running.post("/v1/chat/completions", {"messages": CHAT, "tools": [NOW]})
        assert got.status_code == 400
        assert (got.json()["error"]["param"], got.json()["error"]["code"]) == ("tools", "DSX-E765")


def test_a_turn_with_tools_goes_round(client: openai.OpenAI, server: Running):
    """SERVE-42：模型的调用、工具的结果原样放回去，接着说；提示词里都有。"""
    asked = {"model": NAME, "tools": [WEATHER], "temperature": 0, "max_tokens": 4}
    first = client.chat.completions.create(
        **asked | {"max_tokens": 400, "temperature": 1, "seed": 2},
        messages=CHAT,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    message = first.choices[0].message
    call = message.tool_calls[0]
    history = [
        *CHAT,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "晴"},
    ]
    assert client.chat.completions.create(**asked, messages=history).choices[0].message.content is not None
    prompt = server.served.formats.text(chat_request({"messages": history, "tools": [WEATHER]}))
    assert (
        TOOL_FORMATS["deepseek_v31"].encode([ToolCall(call.id, "get_weather", call.function.arguments)])
        in prompt
    )
    assert "晴" in prompt
    assert "一个城市的天气" in prompt
