"""工具与工具调用，以及各种格式共有的约定。"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from deepseek_export.errors import DsxError

#: 没有写 ``parameters`` 的工具：什么都收。
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Tool:
    """模型可以调用的一个函数。

    Attributes:
        name: 名字。
        description: 做什么用，给模型看。
        parameters: 参数的 JSON Schema，最外层是 object。
        strict: 参数一定要合乎 ``parameters``。
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(ANY_OBJECT))
    strict: bool = False

    @property
    def as_openai(self) -> dict[str, Any]:
        """OpenAI 的写法，聊天模板认的就是它。"""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class ToolCall:
    """一次调用；``arguments`` 是 JSON 文本，最外层是 object。"""

    id: str
    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """参数。

        Raises:
            DsxError: ``DSX-E764``，不是 JSON object。
        """
        try:
            values = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise bad_history(f"调用 {self.name} 的 arguments 不是 JSON：{error}") from error
        if not isinstance(values, dict):
            raise bad_history(f"调用 {self.name} 的 arguments 最外层不是 object")
        return values


@dataclass(frozen=True)
class CallDelta:
    """流式地得到的一小段调用：头一段有 ``name``，之后只有 ``arguments`` 的碎片，接起来是 JSON。

    Attributes:
        index: 这个回答里的第几次调用。
        id: 文本里自带的 id，只在头一段；没有就是 ``None``。
        name: 函数名，只在头一段。
        arguments: ``arguments`` 的下一段。
        done: 这次调用完了。
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    done: bool = False


class Parsed(NamedTuple):
    """一段文本里的正文与调用。"""

    content: str
    calls: tuple[CallDelta, ...] = ()


def drained(step: Callable[[], Parsed | None]) -> Parsed:
    """一步一步地读，读到要等下一段文本（``None``）为止；各步给出的合起来。"""
    content, calls = "", list[CallDelta]()
    while (parsed := step()) is not None:
        content += parsed.content
        calls.extend(parsed.calls)
    return Parsed(content, tuple(calls))


class ToolParser(Protocol):
    """从一个回答里读出调用；文本一段一段地来，怎么切段不改变结果。"""

    def feed(self, piece: str) -> Parsed:
        """送入下一段，返回因此能确定的。"""

    def flush(self) -> Parsed:
        """回答结束了：攥着的也给出来；还没有名字的调用原样算正文。"""


#: 把一段标记写成 Lark 里的记号：特殊 token 写成 id，其余写成字符串。
Spell = Callable[[str], str]


class ToolFormat(Protocol):
    """一种模型怎么在文本里写工具调用。"""

    @property
    def name(self) -> str:
        """``--tool-parser`` 的取值。"""

    @property
    def markers(self) -> Sequence[str]:
        """各个标记；其中是特殊 token 的，解码时要留着。"""

    @property
    def opening(self) -> str:
        """调用从它开始。"""

    @property
    def object_arguments(self) -> bool:
        """聊天模板要的 ``arguments`` 是 object，不是 JSON 文本。"""

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        """读一个回答。"""

    def encode(self, calls: Sequence[ToolCall]) -> str:
        """写成模型会写的样子，从 :attr:`opening` 开始。

        Raises:
            DsxError: ``DSX-E764``，``arguments`` 不是 JSON object。
        """

    def rules(self, tools: Sequence[Tool], parallel: bool, spell: Spell) -> str:
        """Lark 的规则 ``calls``：一次或几次调用，不含 :attr:`opening`；参数合乎各自的 schema。"""

    def describe(self, tools: Sequence[Tool]) -> str:
        """写进 system 的说明，给自己不列出工具的聊天模板。"""


def cut(text: str, markers: Sequence[str]) -> tuple[str, str, str]:
    """在最先出现的标记处切开。

    Returns:
        ``(之前, 标记, 之后)``；一个都没有就是 ``(可以给出的, "", 可能是标记开头的)``。
    """
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, _, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    held = max((overlap(text, marker) for marker in markers), default=0)
    return text[: len(text) - held], "", text[len(text) - held :]


def overlap(text: str, marker: str) -> int:
    """``text`` 的末尾有多少个字是 ``marker`` 的开头，不算整个 ``marker``。"""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


def to_json(value: Any) -> str:
    """不把中文写成 ``\\u`` 的 JSON，一行。"""
    return json.dumps(value, ensure_ascii=False)


def bad_history(what: str) -> DsxError:
    """消息里的工具调用不对（``DSX-E764``）。"""
    return DsxError("DSX-E764", what, "把模型给出的 tool_calls 与工具的结果原样放回 messages")
