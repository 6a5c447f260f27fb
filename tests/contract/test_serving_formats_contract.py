"""specs/serving 的 SERVE-40 到 SERVE-43：约束输出与工具调用，用官方的 openai 客户端与 LangChain。"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest import mock

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

import deepseek_export
from deepseek_export.api import CompiledModel
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.formats.calls import ToolCall
from deepseek_export.formats.chat import TOOL_FORMATS
from deepseek_export.serving.http.formats import ModelFormats
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.schemas import ChatRequest
from tests.serving_http import CHAT, NAME, Running, Scripted, events, loader, opened

pytestmark = pytest.mark.contract

#: 参数都短：小模型会一直写下去。
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "一个城市的天气",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["杭州", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["孔子", "孟子"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    """给 LangChain 与 ``parse`` 的。"""

    name: str = Field(pattern="^[a-z]{1,4}$")
    age: int = Field(ge=0, le=99)


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


def content(server: Running, **fields) -> str:
    """对话的正文；必须是自己停下的。"""
    body = {"messages": CHAT, "max_tokens": 300, "temperature": 0, **fields}
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


# SERVE-40


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema_through_the_client(client: openai.OpenAI, temperature: float):
    """SERVE-40：一定合乎 schema，流式的与整个的相同，自己停下。"""
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    asked = {
        "model": NAME,
        "messages": CHAT,
        "temperature": temperature,
        "seed": 5,
        "response_format": wanted,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    found = json.loads(whole.message.content)
    assert set(found) == {"name", "age"}
    assert found["name"] in ("孔子", "孟子")
    assert 0 <= found["age"] <= 99
    assert whole.finish_reason == "stop"
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.message.content
    parsed = client.chat.completions.parse(
        model=NAME, messages=CHAT, temperature=temperature, response_format=Person
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_vllms_fields(server: Running):
    """SERVE-40：vLLM 的新旧两种写法；续写也行。"""
    assert re.fullmatch("[ab]{3}c", content(server, guided_regex="^[ab]{3}c$"))
    assert content(server, guided_choice=["春天", "秋天"]) in ("春天", "秋天")
    assert content(server, guided_grammar='start: "x" ("y" | "z")') in ("xy", "xz")
    assert json.loads(content(server, guided_json=json.dumps({"const": [1, "二"]}))) == [1, "二"]
    for key, value, want in (
        ("regex", r"\d\d", r"\d\d"),
        ("choice", ["甲"], "甲"),
        ("grammar", 'start: "q"', "q"),
        ("json", {"enum": [7]}, "7"),
    ):
        assert re.fullmatch(want, content(server, structured_outputs={key: value}))
    body = {"prompt": "x", "guided_choice": ["one", "two"], "max_tokens": 9, "n": 3, "seed": 1}
    for choice in server.post("/v1/completions", body).json()["choices"]:
        assert choice["text"] in ("one", "two")


def test_json_object_stays_json_up_to_the_limit(server: Running):
    """SERVE-40：没有说完的是一段 JSON 的开头。"""
    body = {"messages": CHAT, "max_tokens": 30, "response_format": {"type": "json_object"}, "seed": 3}
    (choice,) = server.post("/v1/chat/completions", body).json()["choices"]
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "(?=x)y"}, "guided_regex"),
        ({"guided_regex": "(" * 5000 + ")" * 5000}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "guided_grammar"),
        ({"guided_grammar": '"x"' * 100_000}, "guided_grammar"),
        (
            {"guided_grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000))},
            "guided_grammar",
        ),
        ({"guided_regex": "a?" * 60_000}, "guided_regex"),
        (
            {
                "guided_json": {
                    "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)},
                    "$ref": "#/$defs/d0",
                }
            },
            "guided_json",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": {"type": "foo"}}, "guided_json"),
        ({"guided_json": {"type": "foo", "x-guidance": 5}}, "guided_json"),
        ({"guided_json": False}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json"),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json"),
        (
            {"guided_json": {"allOf": [{"properties": {f"k{i}": {"type": "string"}}} for i in range(3000)]}},
            "guided_json",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice.0"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_hostile_grammars_are_refused_by_field(server: Running, fields: dict, param: str):
    """SERVE-40：写错的、太大的、没有的关键字都是 400，写着是哪个字段；一个 token 也没有算。"""
    before = server.engine.stats.prompt_tokens
    got = server.post("/v1/chat/completions", {"messages": CHAT, **fields})
    assert (got.status_code, got.json()["error"]["param"]) == (400, param), got.text
    assert server.engine.stats.prompt_tokens == before


def test_a_grammar_starts_after_the_thinking(trained_bundle: Path):
    """SERVE-40：提示词替回答开了思考的头，思考随便写，``</think>`` 之后才照语法。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    assert model.tokenizer is not None
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}<think>"
    prompt = model.encode("问<think>")
    ids = model.encode("想{\n</think>\n\n")[1:]
    with Running(lambda: opened(model)) as running:
        spoken = Scripted(model.session.run, len(prompt), ids)
        body = {
            "messages": [{"role": "user", "content": "问"}],
            "temperature": 0,
            "guided_choice": ["甲乙"],
            "max_tokens": 60,
        }
        with mock.patch.object(model.session, "run", spoken):
            message = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("想{\n", "甲乙")


def test_speculation_changes_nothing(tmp_path: Path):
    """SERVE-40：每个验证的位置都照着语法，几个请求混在一批里：文本与不投机的相同，草稿真的用上了。"""
    full = deepseek_export.export(CHECKPOINT, tmp_path / "full", "full").path
    asks = [
        {"messages": CHAT, "max_tokens": 60, "temperature": temperature, "seed": seed, **fields}
        for temperature, seed in ((0, 0), (1, 3))
        for fields in (
            {"guided_regex": "(And the [a-z]{1,8} ){3}"},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            {"tools": [WEATHER, NOW], "tool_choice": "required", "max_tokens": 200},
            {},
        )
    ]
    answers = []
    for speculation in (False, 4):
        settings = {"slots": 4, "queue": 64, "speculation": speculation, "tool_parser": "deepseek_v31"}
        with Running(loader(full, **settings)) as running, ThreadPoolExecutor(len(asks)) as pool:
            got = list(pool.map(lambda ask: running.post("/v1/chat/completions", ask).json(), asks))
            assert bool(sum(running.engine.stats.accepted)) is bool(speculation)
        messages = [one["choices"][0]["message"] for one in got]
        answers.append([(one["content"], _called(one)) for one in messages])
    assert answers[0] == answers[1]


def _called(message: dict) -> list[dict]:
    return [call["function"] for call in message.get("tool_calls", ())]


# SERVE-41


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
        prompt = running.served.chat_orders(_request(asked))[0].prompt
        with mock.patch.object(model.session, "run", Scripted(model.session.run, len(prompt), ids)):
            whole = running.post("/v1/chat/completions", asked).json()
            stream = events(running.post("/v1/chat/completions", asked | {"stream": True}).text)
    return [whole, *stream]


def _request(body: dict) -> ChatRequest:
    return ChatRequest.model_validate(body)


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
    body = _request({"messages": CHAT, "tools": [tool], "tool_choice": "required"})
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


# SERVE-42


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
    prompt = server.served.formats.text(_request({"messages": history, "tools": [WEATHER]}))
    assert (
        TOOL_FORMATS["deepseek_v31"].encode([ToolCall(call.id, "get_weather", call.function.arguments)])
        in prompt
    )
    assert "晴" in prompt
    assert "一个城市的天气" in prompt


# SERVE-43


def test_template_switches(trained_bundle: Path):
    """SERVE-43：``chat_template_kwargs`` 交给模板；``reasoning_effort`` 给认得它的，或拨思考的开关；接着写最后一条。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    assert model.tokenizer is not None
    body = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    end = "{% if add_generation_prompt %}[assistant]{{ '<think>' if thinking else '</think>' }}{% else %}[end]{% endif %}"
    model.tokenizer.chat_template = body + end
    with Running(lambda: opened(model)) as running:

        def text(**fields) -> str:
            return running.served.formats.text(_request({"messages": CHAT, **fields}))

        assert text().endswith("</think>")
        assert text(chat_template_kwargs={"thinking": True}).endswith("<think>")
        assert text(reasoning_effort="high").endswith("<think>")
        assert text(reasoning_effort="none").endswith("</think>")
        assert text(add_generation_prompt=False).endswith("[end]")
        begun = [*CHAT, {"role": "assistant", "content": "学而 "}]
        assert text(messages=begun, continue_final_message=True).endswith("[assistant]学而")
        for fields in ({"messages": CHAT}, {"messages": begun, "add_generation_prompt": True}):
            got = running.post("/v1/chat/completions", {**fields, "continue_final_message": True})
            assert (got.status_code, got.json()["error"]["param"]) == (400, "continue_final_message")
        model.tokenizer.chat_template = body + "{{ reasoning_effort }}"
        assert text(reasoning_effort="low").endswith("low")
