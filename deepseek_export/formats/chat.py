"""聊天模板与工具：认出模型用哪种格式；模板自己不管的，替它写进消息。"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from deepseek_export.formats.calls import Tool, ToolCall, ToolFormat, to_json
from deepseek_export.formats.json_calls import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2
from deepseek_export.formats.markup_calls import DSML, DSML_TOKEN, GLM45, GLM47

#: ``--tool-parser`` 的取值 → 格式。
TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {one.name: one for one in (DEEPSEEK_V3, DEEPSEEK_V31, DSML, GLM45, GLM47, KIMI_K2)}
)

#: 模板怎么用 ``arguments``：自己写成 JSON 的要 object；文本、object 都认的给文本，与模型自己写的一字不差，前缀才接得上。
_EITHER = re.compile(r"arguments['\"]?\]?\s+is\s+string")
_AS_OBJECT = re.compile(r"arguments['\"]?\]?\s*(\|\s*(tojson|items)|\.items\(|or\s*\{\})")


def find_tool_format(template: str | None, has_token: Callable[[str], bool]) -> ToolFormat | None:
    """模型用哪种格式写工具调用。

    Args:
        template: 聊天模板原文；``None`` 没有。
        has_token: 词表里有没有这个 token。

    Returns:
        看不出来就是 ``None``。
    """
    if template is None:
        return DSML if has_token(DSML_TOKEN) else None
    if DSML_TOKEN in template:
        return DSML
    if DEEPSEEK_V3.call in template:
        return DEEPSEEK_V3 if "```" in template else DEEPSEEK_V31
    if KIMI_K2.call in template:
        return KIMI_K2
    if "<arg_key>" in template:
        return GLM45 if re.search(r"</arg_key>(\\n|\s*\n)", template) else GLM47
    return None


def prepared(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    template: str | None,
    style: ToolFormat | None,
) -> list[dict[str, Any]]:
    """交给模板的消息。

    1. 模板认得 ``tool_calls``：只把 ``arguments`` 写成它要的样子（JSON 文本或 object）。
    2. 不认得：调用按 ``style`` 写进助手的正文，工具的结果写成 ``user`` 的话。
    3. 模板自己不列出 ``tools``：说明接在 ``system`` 后面。

    Args:
        messages: OpenAI 的写法。
        tools: 给了哪些工具。
        template: 聊天模板原文；``None`` 是 dsx 自己的编码，什么也不必替它做。
        style: 工具调用的格式；``None`` 时 2、3 都不做。

    Raises:
        DsxError: ``DSX-E764``，``arguments`` 不是 JSON object。
    """
    history = [dict(message) for message in messages]
    if template is None:
        return history
    if "tool_calls" in template:
        as_object = _wants_object(template, style)
        history = [_with_arguments(message, as_object) for message in history]
    elif style is not None:
        history = [_in_text(message, style) for message in history]
    if tools and style is not None and not re.search(r"\btools\b", template):
        if not history or history[0]["role"] != "system":
            history.insert(0, {"role": "system", "content": ""})
        before = history[0]["content"]
        history[0]["content"] = (before + "\n\n" if before else "") + style.describe(tools)
    return history


def _wants_object(template: str, style: ToolFormat | None) -> bool:
    if _EITHER.search(template):
        return False
    return _AS_OBJECT.search(template) is not None or (style is not None and style.object_arguments)


def calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """消息里的调用。"""
    return [
        ToolCall(one.get("id") or "", one["function"]["name"], one["function"]["arguments"])
        for one in message.get("tool_calls") or ()
    ]


def _with_arguments(message: dict[str, Any], as_object: bool) -> dict[str, Any]:
    calls = calls_of(message)
    if not calls:
        return message
    written = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.values if as_object else call.arguments},
        }
        for call in calls
    ]
    return {**message, "tool_calls": written}


def _in_text(message: dict[str, Any], style: ToolFormat) -> dict[str, Any]:
    if message["role"] == "tool":
        result = {"tool_call_id": message.get("tool_call_id"), "content": message["content"]}
        return {"role": "user", "content": to_json({"tool_result": result})}
    calls = calls_of(message)
    if not calls:
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": (message.get("content") or "") + style.encode(calls)}
