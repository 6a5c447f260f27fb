"""DeepSeek-V3.2 的提示词：模型仓库不带 Jinja 模板，只公布了编码的规则，这里照着它写。

规则（模型仓库的 ``encoding`` 目录）：

1. 开头是 bos，之后是各条消息；``system`` 原样，工具的说明与回答的 schema 接在它后面。
2. ``user`` 前后是 ``<｜User｜>`` 与 ``<｜Assistant｜>``，再接 ``<think>``（最后一条，要思考）或 ``</think>``。
3. ``assistant`` 是思考（只在最后一条 ``user`` 之后，要思考）、正文、调用（DSML）、eos。
4. ``tool`` 的各条结果按调用的次序放在一个 ``<function_results>`` 里，之后接着回答，再接 ``<think>`` 或 ``</think>``。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_export.formats.calls import ToolCall, bad_history, to_json
from deepseek_export.formats.markup_calls import DSML, DSML_TOKEN

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_OPEN, _CLOSE = "<think>", "</think>"

# 下面这段是模型训练时见过的，一个字也不能改。
_TOOLS = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of your reply to the user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is an example:
<{dsml}function_calls>
...
</{dsml}function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
{schemas}
</functions>
"""


def render_dsml(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """把对话写成 V3.2 的提示词。

    Args:
        messages: OpenAI 的写法；``role`` 是 ``system``、``user``、``assistant``、``tool``。
        tools: OpenAI 的 ``tools``；写在头一条 ``system`` 里，没有就添一条。
        thinking: 要不要思考。
        add_generation_prompt: 末尾要不要助手的开头；``user`` 与 ``tool`` 之后本来就有它，``False`` 时去掉。

    Raises:
        DsxError: ``DSX-E764``，工具的结果对不上调用，或 ``role`` 不认得。
    """
    history = [dict(message) for message in messages]
    if tools:
        if not history or history[0]["role"] != "system":
            history.insert(0, {"role": "system", "content": ""})
        schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        history[0]["content"] += "\n\n" + _TOOLS.replace("{dsml}", DSML_TOKEN).replace("{schemas}", schemas)
    last_user = max((at for at, one in enumerate(history) if one["role"] == "user"), default=-1)
    parts = [BOS]
    for at, message in enumerate(history):
        opening = _OPEN if thinking and at >= last_user else _CLOSE
        role, content = message["role"], message.get("content") or ""
        if role == "system":
            parts.append(content)
        elif role == "user":
            turn = [_ASSISTANT, opening] if _answered(history, at, add_generation_prompt) else []
            parts += [_USER, content, *turn]
        elif role == "assistant":
            thought = f"{message.get('reasoning_content') or ''}{_CLOSE}" if opening == _OPEN else ""
            parts += [thought, content, _calls(message), EOS]
        elif role == "tool":
            parts.append(_result(history, at, content, opening, add_generation_prompt))
        else:
            raise bad_history(f"messages.{at} 的 role 是 {role!r}，V3.2 的提示词里没有它")
    return "".join(parts)


def _answered(history: Sequence[Mapping[str, Any]], at: int, add_generation_prompt: bool) -> bool:
    """后面有助手的话，或要助手接着说。"""
    return at + 1 < len(history) or add_generation_prompt


def _calls(message: Mapping[str, Any]) -> str:
    calls = [
        ToolCall(one.get("id", ""), one["function"]["name"], one["function"]["arguments"])
        for one in message.get("tool_calls") or ()
    ]
    return "\n\n" + DSML.encode(calls) if calls else ""


def _result(
    history: Sequence[Mapping[str, Any]], at: int, content: str, opening: str, add_generation_prompt: bool
) -> str:
    asked = at
    while asked >= 0 and history[asked]["role"] == "tool":
        asked -= 1
    calls = history[asked].get("tool_calls") if asked >= 0 else None
    number = at - asked
    if not calls or number > len(calls):
        raise bad_history(f"messages.{at} 是工具的结果，前面没有对应的调用")
    text = ("\n\n<function_results>" if number == 1 else "") + f"\n<result>{content}</result>"
    if number < len(calls):
        if at + 1 == len(history) or history[at + 1]["role"] != "tool":
            raise bad_history(f"messages.{asked} 调用了 {len(calls)} 次，只有 {number} 个结果")
        return text
    text += "\n</function_results>"
    return text + f"\n\n{opening}" if _answered(history, at, add_generation_prompt) else text
