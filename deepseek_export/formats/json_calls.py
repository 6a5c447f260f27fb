"""参数写成一整段 JSON 的三种格式：DeepSeek-V3 / R1、DeepSeek-V3.1、Kimi-K2。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_export.formats.calls import CallDelta, Parsed, Spell, Tool, ToolCall, cut, drained, to_json
from deepseek_export.formats.lark import arguments_rule

_FENCE = "```"


@dataclass(frozen=True)
class JsonCalls:
    """``opening 一次调用 … closing``，一次调用是 ``call 头 arguments JSON call_end``。

    Attributes:
        call, arguments, call_end: 调用的开头，头与 JSON 之间，调用的结尾。
        closing: 全部调用的结尾。
        between: 两次调用之间。
        head: 名字前面的。
        numbered: 名字后面带着 ``:第几次``，整个头是这次调用的 id。
        fenced: JSON 放在 ```` ```json ```` 与 ```` ``` ```` 之间。
    """

    name: str
    opening: str
    call: str
    arguments: str
    call_end: str
    closing: str
    between: str
    head: str
    markers: Sequence[str]
    numbered: bool = False
    fenced: bool = False
    object_arguments: bool = False

    def parser(self, tools: Sequence[Tool]) -> JsonCallParser:
        """读一个回答；参数原样给出，不看 schema。"""
        return JsonCallParser(self)

    def encode(self, calls: Sequence[ToolCall]) -> str:
        """写成模型会写的样子。"""
        written = [self._call(call.name, at, call.arguments) for at, call in enumerate(calls)]
        for call in calls:
            _ = call.values  # 不是 JSON object 的不写
        return self.opening + self.between.join(written) + self.closing

    def rules(self, tools: Sequence[Tool], parallel: bool, spell: Spell) -> str:
        """见 :class:`~deepseek_export.formats.calls.ToolFormat`。"""
        before, after = self._around
        lines = []
        for at, tool in enumerate(tools):
            head = spell(self.call + self.head + tool.name)
            if self.numbered:
                head += ' ":" /[0-9]{1,3}/'
            lines.append(f"call_{at}: {head} {spell(before)} arguments_{at} {spell(after)}")
            lines.append(arguments_rule(f"arguments_{at}", tool.parameters))
        lines.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
        more = f" ({spell(self.between)} call)*" if parallel else ""
        lines.append(f"calls: call{more} {spell(self.closing)}")
        return "\n".join(lines)

    def describe(self, tools: Sequence[Tool]) -> str:
        """格式的写法照着各模型公布的提示词。"""
        listed = [
            f"### {tool.name}\nDescription: {tool.description or ''}\n\nParameters: {to_json(tool.parameters)}"
            for tool in tools
        ]
        sample = self.opening + self._call("NAME", 0, "ARGUMENTS") + self.closing
        return (
            "## Tools\nYou have access to the following tools:\n\n"
            + "\n\n".join(listed)
            + "\n\nTo use tools, write exactly this, where NAME is one of the tools above and ARGUMENTS is a JSON "
            + f"object that follows its Parameters:\n{sample}\n"
            + f"For several calls, repeat the part from {self.call} to {self.call_end}."
        )

    @property
    def _around(self) -> tuple[str, str]:
        if self.fenced:
            return f"\n{_FENCE}json\n", f"\n{_FENCE}{self.call_end}"
        return self.arguments, self.call_end

    def read(self, head: str) -> tuple[str | None, str]:
        """由调用的头读出 ``(id, 名字)``；头里前面的部分模型有时不写。"""
        given = head.strip()
        name = given.rpartition(":")[0] if self.numbered else given
        name = name.rpartition(_SEP)[2] if self.fenced else name.removeprefix(self.head)
        return given if self.numbered else None, name.strip() or given

    def _call(self, name: str, at: int, arguments: str) -> str:
        before, after = self._around
        number = f":{at}" if self.numbered else ""
        return self.call + self.head + name + number + before + arguments + after


class JsonCallParser:
    """按 :class:`JsonCalls` 读一个回答。"""

    def __init__(self, style: JsonCalls) -> None:
        self._style = style
        self._step: Callable[[], Parsed | None] = self._text
        self._held = ""
        self._raw = ""  # 没有读完的一次调用的原文
        self._count = 0
        self._begun = False  # 参数给出过没有

    def feed(self, piece: str) -> Parsed:
        """送入下一段。"""
        self._held += piece
        return drained(lambda: self._step())  # _step 读着读着会换成别的

    def flush(self) -> Parsed:
        """没有读到名字的原样算正文；参数没有写完的就到这里。"""
        text, self._held = self._raw + self._held, ""
        if self._step == self._arguments:
            return Parsed("", (CallDelta(self._count, arguments=self._unfenced(text)),) if text else ())
        return Parsed("" if self._step == self._section and self._count else text)

    def _text(self) -> Parsed | None:
        before, marker, self._held = cut(self._held, [self._style.opening])
        if marker:
            self._step, self._raw = self._section, marker
            return Parsed(before.rstrip())
        shown = before.rstrip()  # 标记前面的空白不算正文，等看清楚
        self._held = before[len(shown) :] + self._held
        return Parsed(shown) if shown else None

    def _section(self) -> Parsed | None:
        between, marker, self._held = cut(self._held, [self._style.call, self._style.closing])
        self._raw += between + marker
        if marker == self._style.call:
            self._step = self._head
        elif marker:
            self._step, self._raw = self._text, ""
        return Parsed("") if marker else None

    def _head(self) -> Parsed | None:
        end = f"{_FENCE}json" if self._style.fenced else self._style.arguments
        head, marker, rest = cut(self._held, [end])
        if not marker:
            return None
        self._held, self._raw, self._step, self._begun = rest, "", self._arguments, False
        given, name = self._style.read(head)
        return Parsed("", (CallDelta(self._count, given, name),))

    def _arguments(self) -> Parsed | None:
        text, marker, self._held = cut(self._held, [self._style.call_end, self._style.closing])
        if not self._begun:
            text = text.lstrip()
        if marker:
            last = CallDelta(self._count, arguments=self._unfenced(text), done=True)
            self._count += 1
            self._step = self._text if marker == self._style.closing else self._section
            return Parsed("", (last,))
        shown = text.rstrip().rstrip("`").rstrip() if self._style.fenced else text.rstrip()
        self._held = text[len(shown) :] + self._held
        self._begun = self._begun or bool(shown)
        return Parsed("", (CallDelta(self._count, arguments=shown),)) if shown else None

    def _unfenced(self, text: str) -> str:
        text = text.rstrip()
        return text.removesuffix(_FENCE).rstrip() if self._style.fenced else text


_SEP = "<｜tool▁sep｜>"
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    _SEP,
)
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)

DEEPSEEK_V3 = JsonCalls(
    name="deepseek_v3",
    opening=_DEEPSEEK[0],
    call=_DEEPSEEK[2],
    arguments=_SEP,
    call_end=_DEEPSEEK[3],
    closing=_DEEPSEEK[1],
    between="\n",
    head=f"function{_SEP}",
    fenced=True,
    markers=_DEEPSEEK,
)
DEEPSEEK_V31 = JsonCalls(
    name="deepseek_v31",
    opening=_DEEPSEEK[0],
    call=_DEEPSEEK[2],
    arguments=_SEP,
    call_end=_DEEPSEEK[3],
    closing=_DEEPSEEK[1],
    between="",
    head="",
    markers=_DEEPSEEK,
)
KIMI_K2 = JsonCalls(
    name="kimi_k2",
    opening=_KIMI[0],
    call=_KIMI[2],
    arguments=_KIMI[4],
    call_end=_KIMI[3],
    closing=_KIMI[1],
    between="",
    head="functions.",
    numbered=True,
    markers=_KIMI,
)
