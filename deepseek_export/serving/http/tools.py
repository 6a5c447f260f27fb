"""工具的字段：``tools``、``tool_choice``、``parallel_tool_calls``，与消息里的 ``tool_calls``。"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool

from deepseek_export.formats.calls import ANY_OBJECT, Tool
from deepseek_export.serving.http.problems import ApiError

#: 一个请求至多几个工具。
MAX_TOOLS = 1024

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class FunctionSpec(BaseModel):
    """``tools`` 里的一个函数。"""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @property
    def tool(self) -> Tool:
        """同一个东西，与协议无关。"""
        parameters = self.parameters or dict(ANY_OBJECT)
        return Tool(self.name, self.description, parameters, bool(self.strict))


class ToolSpec(BaseModel):
    """``tools`` 的一项；只有函数这一种。"""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(BaseModel):
    """指名的那个函数。"""

    name: str


class NamedChoice(BaseModel):
    """``tool_choice`` 指名一个函数。"""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(BaseModel):
    """消息里调用了的函数；``arguments`` 是 JSON 文本。"""

    name: str
    arguments: str = "{}"


class CalledTool(BaseModel):
    """助手消息里的一次调用。"""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Tooled(BaseModel):
    """``/v1/chat/completions`` 里与工具有关的。"""

    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def offered(self) -> list[Tool]:
        """给模型看的工具；``tool_choice`` 是 ``none`` 时一个也不给，模型也就不会去调用。"""
        if self.tool_choice == "none":
            return []
        return [spec.function.tool for spec in self.tools or ()]

    @property
    def forced(self) -> list[Tool]:
        """必须调用其中的一个；不必调用是空的。

        Raises:
            ApiError: 400，没有给工具，或指名的不在里面。
        """
        if self.tool_choice in (None, "none", "auto"):
            return []
        offered = self.offered
        if not offered:
            raise ApiError(400, "给了 tool_choice 而没有给 tools", param="tool_choice", code="invalid_value")
        if self.tool_choice == "required":
            return offered
        assert isinstance(self.tool_choice, NamedChoice)
        name = self.tool_choice.function.name
        named = [tool for tool in offered if tool.name == name]
        if not named:
            raise ApiError(
                400, f"tool_choice 指名的 {name!r} 不在 tools 里", param="tool_choice", code="invalid_value"
            )
        return named

    def checked_tools(self) -> None:
        """名字不重复。

        Raises:
            ApiError: 400。
        """
        names = [tool.name for tool in self.offered]
        twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if twice is not None:
            raise ApiError(400, f"tools 里有两个 {twice!r}", param="tools", code="invalid_value")
