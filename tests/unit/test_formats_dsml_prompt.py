"""DeepSeek-V3.2 的提示词，照着它公布的规则。"""

from __future__ import annotations

import json

import pytest

from deepseek_export.errors import DsxError
from deepseek_export.formats.calls import Tool, ToolCall
from deepseek_export.formats.dsml_prompt import render_dsml
from deepseek_export.formats.markup_calls import DSML

pytestmark = pytest.mark.unit

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CALLS = [ToolCall("a", "f", '{"x": "一", "n": 2}'), ToolCall("b", "g", "{}")]
ASKED = {
    "role": "assistant",
    "content": "查",
    "reasoning_content": "要查",
    "tool_calls": [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in CALLS
    ],
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def result(text: str) -> dict:
    return {"role": "tool", "content": text}


def test_the_published_examples():
    """模型仓库里的例子：以前的思考不留，最后一条 user 之后接着想；不思考的直接答。"""
    history = [
        {"role": "system", "content": "S"},
        user("hello"),
        {"role": "assistant", "content": "Hello!", "reasoning_content": "thinking..."},
        user("1+1=?"),
    ]
    past = f"{BOS}S{USER}hello{ASSISTANT}</think>Hello!{EOS}{USER}1+1=?{ASSISTANT}"
    assert render_dsml(history, thinking=True) == past + "<think>"
    assert render_dsml(history) == past + "</think>"
    assert render_dsml(history, add_generation_prompt=False) == past.removesuffix(ASSISTANT)


def test_calls_and_results():
    """结果按次序放在一起；最后一条 user 之后的思考留着，接着想。"""
    history = [user("天气"), ASKED, result("晴"), result("18")]
    results = "<function_results>\n<result>晴</result>\n<result>18</result>\n</function_results>"
    calls = f"\n\n{DSML.encode(CALLS)}{EOS}\n\n{results}\n\n"
    assert render_dsml(history, thinking=True) == (
        f"{BOS}{USER}天气{ASSISTANT}<think>要查</think>查{calls}<think>"
    )
    assert render_dsml(history) == f"{BOS}{USER}天气{ASSISTANT}</think>查{calls}</think>"
    assert render_dsml(history, add_generation_prompt=False).endswith("</function_results>")
    later = render_dsml([*history, {"role": "assistant", "content": "好"}, user("谢")], thinking=True)
    assert "要查" not in later
    assert later.endswith(f"</think>好{EOS}{USER}谢{ASSISTANT}<think>")


def test_tools_go_into_the_system_message():
    """没有 system 就添一条；schema 一行一个。"""
    tool = Tool("f", "做", {"type": "object", "properties": {"x": {"type": "string"}}}).as_openai
    for history, start in (
        ([user("问")], f"{BOS}\n\n## Tools\n"),
        ([{"role": "system", "content": "S"}, user("问")], f"{BOS}S\n\n## Tools\n"),
    ):
        text = render_dsml(history, [tool, tool])
        assert text.startswith(start)
        listed = text.partition("<functions>\n")[2].partition("\n</functions>\n")[0]
        assert [json.loads(line) for line in listed.splitlines()] == [tool["function"]] * 2
        assert text.endswith(f"</functions>\n{USER}问{ASSISTANT}</think>")
        assert '<｜DSML｜invoke name="$FUNCTION_NAME">' in text
        assert "{dsml}" not in text


@pytest.mark.parametrize(
    "history",
    [
        [result("x")],
        [user("问"), result("x")],
        [user("问"), {"role": "assistant", "content": "答"}, result("x")],
        [user("问"), ASKED, result("x"), user("问")],
        [user("问"), ASKED, result("x")],
        [user("问"), ASKED, result("x"), result("x"), result("x")],
        [{"role": "function", "content": "x"}],
        [{**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
    ],
)
def test_histories_that_do_not_fit(history: list[dict]):
    """DSX-E764"""
    with pytest.raises(DsxError, match="DSX-E764"):
        render_dsml(history)
