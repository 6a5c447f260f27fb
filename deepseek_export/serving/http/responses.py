"""``/v1/responses`` 的请求：变成同样意思的对话请求。"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.schemas import ChatRequest, Number
from deepseek_export.serving.http.tools import MAX_TOOLS, FunctionName
from deepseek_export.serving.http.unsupported import refuse_unsupported

#: 字段 → 不改变结果、因此可以给的值。dsx 不留着以前的回答，``store`` 给什么都答 ``false``。
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "background": (None, False),
        "context_management": (None, []),
        "conversation": (None,),
        "max_tool_calls": (None,),
        "previous_response_id": (None,),
        "prompt": (None,),
        "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    }
)
#: 对话请求的字段在这里叫什么，错误里要说对。
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "response_format.json_schema.schema": "text.format.schema",
        "response_format.json_schema": "text.format",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "messages": "input",
    }
)


class Text(BaseModel):
    """一段文字；图片、文件不认得，会被拒绝。"""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str = ""


class MessageItem(BaseModel):
    """一条消息；``type`` 可以不写。"""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Text]


class CallItem(BaseModel):
    """模型以前的一次调用。"""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(BaseModel):
    """一次调用的结果。"""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Text]


class ReasoningItem(BaseModel):
    """模型以前的思考；只有密文的（别家给的）读不出来，不算。"""

    type: Literal["reasoning"]
    summary: list[Text] | None = None
    content: list[Text] | None = None


Item = MessageItem | CallItem | OutputItem | ReasoningItem


class FunctionTool(BaseModel):
    """一个函数；别种工具要服务一边去做，没有。"""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class FunctionChoice(BaseModel):
    """指名一个函数。"""

    type: Literal["function"]
    name: str


class Format(BaseModel):
    """``text.format``。"""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(BaseModel):
    """``text``；``verbosity`` 没有模型认得，不理会缺省的。"""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(BaseModel):
    """``reasoning``；思考原样给出，没有另写的摘要。"""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(BaseModel):
    """``POST /v1/responses``。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    stream: StrictBool | None = None
    store: StrictBool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    cache_salt: str | None = None

    def chat(self) -> ChatRequest:
        """同样意思的对话请求。

        Raises:
            ApiError: 400，用到没有的字段。
        """
        refuse_unsupported(self.model_extra or {}, UNSUPPORTED)
        if "message.output_text.logprobs" in (self.include or ()):
            what = "还不支持 include 里的 message.output_text.logprobs，去掉它再试"
            raise ApiError(400, what, param="include", code="unsupported_parameter")
        asked: dict[str, Any] = {
            "messages": self._messages(),
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in self.tools or ()
            ],
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "max_tokens": self.max_output_tokens,
        }
        same = ("model", "temperature", "top_p", "top_k", "seed", "stream", "user", "cache_salt")
        return ChatRequest.model_validate(asked | {name: getattr(self, name) for name in same})

    def _choice(self) -> Any:
        if isinstance(self.tool_choice, FunctionChoice):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type != "json_schema":
            return None if wanted is None else {"type": wanted.type}
        return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.content or {}}}

    def _messages(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        if self.instructions:
            made.append({"role": "system", "content": self.instructions})
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if isinstance(item, OutputItem):
                made.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            elif isinstance(item, MessageItem) and item.role != "assistant":
                made.append({"role": item.role, "content": _joined(item.content)})
            else:
                _add(made, item)
        return made


def _add(made: list[dict[str, Any]], item: Item) -> None:
    """助手的思考、正文、调用在这里各是一项，在对话里是同一条消息。"""
    if not made or made[-1]["role"] != "assistant":
        made.append({"role": "assistant", "content": None})
    message = made[-1]
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        calls = message.setdefault("tool_calls", [])
        calls.append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        thought = _joined(item.content or item.summary or [])
        message["reasoning_content"] = (message.get("reasoning_content") or "") + thought
    elif isinstance(item, MessageItem):
        message["content"] = (message["content"] or "") + _joined(item.content)


def _joined(content: str | list[Text]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text or part.refusal for part in content)
