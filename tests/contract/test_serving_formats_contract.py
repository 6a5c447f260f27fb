"""specs/serving 的 SERVE-40 到 SERVE-43：约束输出与工具调用，用官方的 openai 客户端与 LangChain。"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import openai
import pytest

import deepseek_export
from deepseek_export.cli.demo import CHECKPOINT
from tests.serving_http import CHAT, NAME, Running, Scripted, loader, opened
from tests.serving_schemas import NOW, PERSON, WEATHER, Person, called, chat_request

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


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
        answers.append([(one["content"], called(one)) for one in messages])
    assert answers[0] == answers[1]


# SERVE-41


# SERVE-42


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
            return running.served.formats.text(chat_request({"messages": CHAT, **fields}))

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
