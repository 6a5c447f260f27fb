"""``/v1/messages``（Anthropic）的请求：变成同样意思的对话请求。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from deepseek_export.serving.http.schemas import MAX_STOPS, ChatRequest, Number
from deepseek_export.serving.http.tools import MAX_TOOLS, FunctionName
from deepseek_export.serving.http.unsupported import refuse_unsupported

#: 字段 → 不改变结果、因此可以给的值。
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {"container": (None,), "context_management": (None, {}), "mcp_servers": (None, [])}
)
#: 对话请求的字段在这里叫什么，错误里要说对。
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "response_format.json_schema.schema": "output_config.format.schema",
        "reasoning_effort": "thinking",
        "continue_final_message": "messages",
    }
)


class TextBlock(BaseModel):
    """一段文字。"""

    type: Literal["text"]
    text: str


class ThinkingBlock(BaseModel):
    """模型以前的思考。"""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(BaseModel):
    """别家的密文，读不出来，不算。"""

    type: Literal["redacted_thinking"]


class UseBlock(BaseModel):
    """模型以前的一次调用。"""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ResultBlock(BaseModel):
    """一次调用的结果。"""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: StrictBool | None = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | UseBlock | ResultBlock, Field(discriminator="type")
]


class InputMessage(BaseModel):
    """一条消息；图片、文件的块不认得，会被拒绝。"""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolSpec(BaseModel):
    """一个工具；别种工具要服务一边去做，没有。"""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: StrictBool | None = None


class ToolChoice(BaseModel):
    """``tool_choice``。"""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: StrictBool | None = None


class Thinking(BaseModel):
    """``thinking``；``budget_tokens`` 是给模型的参考，不强行打断思考。"""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: StrictInt | None = None


class OutputFormat(BaseModel):
    """``output_config.format``。"""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["json_schema"]
    content: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """``output_config``；多出来的会被拒绝。"""

    model_config = ConfigDict(extra="forbid")

    format: OutputFormat | None = None


class CountRequest(BaseModel):
    """``POST /v1/messages/count_tokens``。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> ChatRequest:
        """同样意思的对话请求。最后一条是助手的，就接着写它。

        Raises:
            ApiError: 400，用到没有的字段。
        """
        refuse_unsupported(self.model_extra or {}, UNSUPPORTED)
        choice = self.tool_choice
        wanted = self.output_config.format if self.output_config else None
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(),
            "tools": [_tool(tool) for tool in self.tools or ()],
            "tool_choice": None if choice is None else _choice(choice),
            "parallel_tool_calls": None if choice is None else not choice.disable_parallel_tool_use,
            "reasoning_effort": {"enabled": "high", "disabled": "none"}.get(
                self.thinking.type if self.thinking else ""
            ),
            "continue_final_message": self.messages[-1].role == "assistant" or None,
        }
        if wanted is not None:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.content}}
        return ChatRequest.model_validate(asked | self._sampling())

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        if self.system:
            made.append({"role": "system", "content": _joined(self.system)})
        for message in self.messages:
            made.extend(_message(message))
        return made


class MessagesRequest(CountRequest):
    """``POST /v1/messages``。"""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    stream: StrictBool | None = None

    def _sampling(self) -> dict[str, Any]:
        same = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        return {**{name: getattr(self, name) for name in same}, "stop": self.stop_sequences}


def _message(message: InputMessage) -> list[dict[str, Any]]:
    """一条变成一条或几条：工具的结果在对话里各是一条，在 ``user`` 的话前面。"""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts = [
        {"type": "text", "text": block.text} for block in message.content if isinstance(block, TextBlock)
    ]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content or "")}
        for block in message.content
        if isinstance(block, ResultBlock)
    ]
    if message.role != "assistant":
        return [*results, *([{"role": message.role, "content": texts}] if texts or not results else [])]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for block in message.content
        if isinstance(block, UseBlock)
    ]
    made: dict[str, Any] = {"role": "assistant", "content": texts}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return [*results, made]


def _tool(tool: ToolSpec) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return "required" if choice.type == "any" else choice.type


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
