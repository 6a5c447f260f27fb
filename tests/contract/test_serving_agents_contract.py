"""specs/serving 的 SERVE-44、SERVE-45：``/v1/responses`` 与 ``/v1/messages``，用官方的 openai 与 anthropic 客户端。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import anthropic
import openai
import pytest
from openai.types.responses import Response

import deepseek_export
from deepseek_export.errors import DsxError
from deepseek_export.formats.calls import ToolCall
from deepseek_export.formats.chat import TOOL_FORMATS
from deepseek_export.model import CompiledModel
from deepseek_export.serving.http.keys import KeyRing
from tests.serving_http import NAME, Running, Scripted, alone, loader, opened

pytestmark = pytest.mark.contract

ASK = "《论语》"
CHAT = [{"role": "user", "content": ASK}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["杭州", "北京"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "description": "天气",
    "parameters": SCHEMA,
    "strict": True,
}
TOOL = {"name": "get_weather", "description": "天气", "input_schema": SCHEMA}
STYLE = TOOL_FORMATS["deepseek_v31"]
CALL = ToolCall("", "get_weather", '{"city": "杭州", "days": 3}')
#: 先想，再说，再调用两次。
SPOKEN = "<think>\n想一想</think>\n\n我查。" + STYLE.encode([CALL, CALL])


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> CompiledModel:
    """对照：不经过服务。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture(scope="module")
def server(trained_bundle: Path) -> Iterator[Running]:
    """要密钥的。"""
    keys = KeyRing(["secret"])
    with Running(loader(trained_bundle, slots=4, queue=64, tool_parser=STYLE.name), keys=keys) as running:
        running.client.headers["x-api-key"] = "secret"
        yield running


@pytest.fixture
def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    """官方的客户端，不重试。"""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as one:
        yield one


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    """Anthropic 官方的客户端，不重试；密钥在 ``x-api-key`` 里。"""
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def spoken(trained_bundle: Path) -> Iterator[Running]:
    """照着 :data:`SPOKEN` 说的服务；提示词与 :data:`CHAT` 加上工具的相同长。"""
    one = deepseek_export.load(trained_bundle, threads=1)
    ids = [*one.encode(SPOKEN)[1:], 1]
    with Running(lambda: opened(one, tool_parser=STYLE.name)) as running:
        counted = running.post("/v1/messages/count_tokens", {"messages": CHAT, "tools": [TOOL]}).json()
        with mock.patch.object(one.session, "run", Scripted(one.session.run, counted["input_tokens"], ids)):
            yield running


# SERVE-44


def test_responses_equal_the_generator(openai_client: openai.OpenAI, model: CompiledModel):
    """SERVE-44：整个的与流式的，文本都与生成器的相同；没有说完的是 ``incomplete``。"""
    want = alone(model, ASK, chat=True, max_new_tokens=12)
    whole = openai_client.responses.create(model=NAME, input=ASK, temperature=0, max_output_tokens=12)
    assert whole.output_text == want
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    items = [{"role": "user", "content": [{"type": "input_text", "text": ASK}]}]
    with openai_client.responses.stream(
        model=NAME, input=items, temperature=0, max_output_tokens=400
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == alone(model, ASK, chat=True, max_new_tokens=400)
    assert final.status == "completed"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}


def test_every_item_of_a_response_in_order(spoken: Running):
    """SERVE-44：思考、正文、两次调用各是一项；事件逐个数，类型齐全，拼起来就是整个的。"""
    asked = {"model": NAME, "input": ASK, "temperature": 0, "tools": [FUNCTION | {"strict": False}]}
    with openai.OpenAI(base_url=f"{spoken.url}/v1", api_key="x", max_retries=0) as client:
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text == "想一想"
    assert whole.output_text == "我查。"
    assert [json.loads(item.arguments) for item in whole.output[2:]] == [CALL.values] * 2
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert isinstance(final, Response)
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output_text == whole.output_text
    for number, item in enumerate(final.output):
        mine = [event for event in events if getattr(event, "output_index", None) == number]
        assert mine[0].type == "response.output_item.added"
        assert mine[-1].type == "response.output_item.done"
        assert mine[-1].item == item
        pieces = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert pieces == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_responses_tools_and_json(openai_client: openai.OpenAI):
    """SERVE-44：指名的工具、``text.format``；调用与结果原样放回去接着说。"""
    named = {"type": "function", "name": "get_weather"}
    first = openai_client.responses.create(model=NAME, input=ASK, tools=[FUNCTION], tool_choice=named)
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("杭州", "北京")
    history = [
        {"role": "user", "content": ASK},
        *[item.model_dump() for item in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "晴"},
    ]
    again = openai_client.responses.create(
        model=NAME, input=history, tools=[FUNCTION], instructions="简短", max_output_tokens=4
    )
    assert again.output
    wanted = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}}
    made = openai_client.responses.create(model=NAME, input=ASK, text=wanted)
    assert set(json.loads(made.output_text)) == {"city", "days"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": "x" * 4000}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_responses_requests(server: Running, fields: dict, param: str):
    """SERVE-44：400，写着是哪个字段，用的是这个端点的名字。"""
    got = server.post("/v1/responses", {"input": ASK, "max_output_tokens": 1, **fields})
    assert (got.status_code, got.json()["error"]["param"]) == (400, param), got.text


# SERVE-45


def test_messages_equal_the_generator(claude: anthropic.Anthropic, model: CompiledModel):
    """SERVE-45：整个的与流式的，文本都与生成器的相同；停止串写着是哪个；token 数对得上。"""
    want = alone(model, ASK, chat=True, max_new_tokens=400)
    asked = {"model": NAME, "messages": CHAT, "extra_body": {"temperature": 0}, "max_tokens": 400}
    whole = claude.messages.create(**asked)
    assert [block.text for block in whole.content] == [want]
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    counted = claude.messages.count_tokens(model=NAME, messages=CHAT)
    assert counted.input_tokens == len(model.encode(ASK, chat=True))
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].text == want
    assert kinds[0] == "message_start"
    assert kinds[1] == "content_block_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert claude.messages.create(**asked | {"max_tokens": 3}).stop_reason == "max_tokens"
    cut = claude.messages.create(**asked, stop_sequences=["没有", want[3:6]])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", want[3:6])
    assert cut.content[0].text == want[: want.index(want[3:6])]
    total = final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    assert total == counted.input_tokens


def test_every_block_of_a_message_in_order(spoken: Running):
    """SERVE-45：思考、正文、两次调用各是一块，流式的拼起来就是整个的。"""
    asked = {"model": NAME, "messages": CHAT, "max_tokens": 400, "tools": [TOOL]}
    with anthropic.Anthropic(base_url=spoken.url, api_key="x", max_retries=0) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
    for message in (whole, final):
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert message.content[0].thinking == "想一想"
        assert message.content[1].text == "我查。"
        assert [block.input for block in message.content[2:]] == [CALL.values] * 2
        assert message.stop_reason == "tool_use"


def test_messages_tools_go_round(claude: anthropic.Anthropic, server: Running):
    """SERVE-45：必须调用的一定调用；调用与结果原样放回去接着说；最后一条是助手的就接着写。"""
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    first = claude.messages.create(
        model=NAME, messages=CHAT, tools=[TOOL], tool_choice=choice, max_tokens=400
    )
    (call,) = first.content
    assert call.type == "tool_use"
    assert call.input["city"] in ("杭州", "北京")
    history = [
        *CHAT,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "晴"}]},
                {"type": "text", "text": "谢谢"},
            ],
        },
    ]
    again = claude.messages.create(model=NAME, messages=history, tools=[TOOL], system="简短", max_tokens=4)
    assert again.stop_reason == "max_tokens"
    begun = [*CHAT, {"role": "assistant", "content": "子曰：“学"}]
    prefix = claude.messages.count_tokens(model=NAME, messages=begun).input_tokens
    assert prefix > claude.messages.count_tokens(model=NAME, messages=CHAT).input_tokens
    schema = {"format": {"type": "json_schema", "schema": SCHEMA}}
    got = server.post("/v1/messages", {"messages": CHAT, "max_tokens": 400, "output_config": schema}).json()
    assert set(json.loads(got["content"][0]["text"])) == {"city", "days"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"messages": [{"role": "user", "content": "x" * 4000}]}, "E511"),
    ],
)
def test_bad_messages_requests(server: Running, fields: dict, word: str):
    """SERVE-45：400，Anthropic 的格式，写着是哪个字段。"""
    got = server.post("/v1/messages", {"messages": CHAT, "max_tokens": 1, **fields})
    assert got.status_code == 400
    assert got.json()["type"] == "error"
    assert got.json()["error"]["type"] == "invalid_request_error"
    assert word in got.json()["error"]["message"]


def test_errors_of_the_messages_endpoint(server: Running):
    """SERVE-45：密钥不对、没有这个模型，客户端认得出来。"""
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as one,
        pytest.raises(anthropic.AuthenticationError),
    ):
        one.messages.create(model=NAME, messages=CHAT, max_tokens=1)
    got = server.post("/v1/messages", {"messages": CHAT, "max_tokens": 1, "model": "claude"})
    assert (got.status_code, got.json()["error"]["type"]) == (404, "not_found_error")


def test_errors_after_the_stream_began(trained_bundle: Path):
    """SERVE-44、SERVE-45：已经开始的流以各自的错误事件结束。"""
    one = deepseek_export.load(trained_bundle, threads=1)
    broken = DsxError("DSX-E513", "假装的", "不必")
    with Running(lambda: opened(one)) as running:

        class Fails:
            def __call__(self, *arguments):
                raise broken

        with mock.patch.object(one.session, "run", Fails()):
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
                last = list(client.responses.create(model=NAME, input=ASK, stream=True))[-1]
            assert last.type == "response.failed"
            assert last.response.status == "failed"
            assert last.response.error is not None
            assert last.response.error.code == "DSX-E513"
            with (
                anthropic.Anthropic(base_url=running.url, api_key="x", max_retries=0) as client,
                pytest.raises(anthropic.APIStatusError, match="DSX-E513"),
            ):
                list(client.messages.create(model=NAME, messages=CHAT, max_tokens=9, stream=True))
