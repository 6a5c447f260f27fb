"""参数一个一个写在标签里的两种格式：DeepSeek-V3.2 起的 DSML，GLM-4.5 起的。"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_export.formats.calls import CallDelta, Parsed, Spell, Tool, ToolCall, cut, drained, to_json
from deepseek_export.formats.lark import ANY_TEXT, json_rule, text_kind, text_pattern, until, within

DSML_TOKEN = "｜DSML｜"


@dataclass(frozen=True)
class MarkupCalls:
    """一次调用是 ``call 名字 name_end (parameter 头 header_end 值 value_end)* call_end``，字符串的值不转义。

    Attributes:
        openings: 全部调用的开头，头一个是要写的，别的也认；空串表示没有，调用自己就是开头。
        closings: 与 ``openings`` 对应的结尾。
        call, name_end, call_end: 调用的开头、名字后面、结尾。
        parameter, header_end, value_end: 一个参数的开头、值之前、值之后。
        typed: 头里写着值是不是字符串（``string="true"``）；没有写的看 schema。
        line: 各部分之间写什么。
    """

    name: str
    openings: Sequence[str]
    closings: Sequence[str]
    call: str
    name_end: str
    call_end: str
    parameter: str
    header_end: str
    value_end: str
    typed: bool
    markers: Sequence[str]
    object_arguments: bool
    line: str = "\n"

    @property
    def opening(self) -> str:
        """调用从它开始。"""
        return self.openings[0] or self.call

    def parser(self, tools: Sequence[Tool]) -> MarkupCallParser:
        """读一个回答；``tools`` 用来看没有写明的值是不是字符串。"""
        return MarkupCallParser(self, tools)

    def encode(self, calls: Sequence[ToolCall]) -> str:
        """写成模型会写的样子。"""
        written = self.line.join(self._call(call.name, call.values) for call in calls)
        if not self.openings[0]:
            return written
        return self.openings[0] + self.line + written + self.line + self.closings[0]

    def rules(self, tools: Sequence[Tool], parallel: bool, spell: Spell) -> str:
        """见 :class:`~deepseek_export.formats.calls.ToolFormat`。参数照 schema 里的次序，必要的一个不少。"""
        lines = []
        opened = self.openings[0]
        for at, tool in enumerate(tools):
            body, rules = self._parameters(f"call_{at}", tool.parameters, spell)
            # 没有总的开头时，调用的开头就是 opening，头一次的已经写过了。
            start = spell(tool.name + self.name_end + self.line)
            lines += [f"call_{at}: {start} {body} {spell(self.call_end)}", *rules]
        lines.append("call: " + " | ".join(f"call_{at}" for at in range(len(tools))))
        again = spell(self.line + self.call)
        more = f" ({again} call)*" if parallel else ""
        if opened:
            lines.append(f"calls: {again} call{more} {spell(self.line + self.closings[0])}")
        else:
            lines.append(f"calls: call{more}")
        return "\n".join(lines)

    def describe(self, tools: Sequence[Tool]) -> str:
        """给自己不列出工具的聊天模板；DSML 的模型由自己的编码列出，见 :mod:`.dsml_prompt`。"""
        listed = "\n".join(to_json(tool.as_openai["function"]) for tool in tools)
        sample = self.encode([ToolCall("", "NAME", '{"PARAMETER": "VALUE"}')])
        return (
            f"## Tools\nYou have access to the following tools, in JSON Schema format:\n{listed}\n\n"
            f"To use a tool, write exactly this, one PARAMETER after another:\n{sample}\n"
            "Strings are written as they are, everything else as JSON."
        )

    def header(self, key: str, is_text: bool) -> str:
        """一个参数的头，到值之前为止。"""
        if self.typed:
            return f'{self.parameter}{key}" string="{str(is_text).lower()}{self.header_end}'
        return f"{self.parameter}{key}</arg_key>{self.line}{self.header_end}"

    def read_header(self, header: str) -> tuple[str, bool | None]:
        """由头读出 ``(键, 是不是字符串)``；没有写明是 ``None``。"""
        if not self.typed:
            return header.rpartition("</arg_key>")[0].strip() or header.strip(), None
        found = re.fullmatch(r'(.*?)"\s*string="(true|false)', header, re.DOTALL)
        return (header, None) if found is None else (found[1], found[2] == "true")

    def _call(self, name: str, values: Mapping[str, Any]) -> str:
        parts = [self.call + name + self.name_end]
        for key, value in values.items():
            text = isinstance(value, str)
            parts.append(self.header(key, text) + (value if text else to_json(value)) + self.value_end)
        return self.line.join([*parts, self.call_end])

    def _parameters(self, rule: str, schema: Mapping[str, Any], spell: Spell) -> tuple[str, list[str]]:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return "", []
        given = schema.get("required")
        required = given if isinstance(given, list) else []
        body, rules = [], []
        for at, (key, one) in enumerate(properties.items()):
            name = f"{rule}_{at}"
            text, other = text_kind(one, schema)
            ways = []
            if text:
                end = self.value_end + self.line
                rules.append(until(f"{name}_text", text_pattern(one) if not other else ANY_TEXT, end, spell))
                ways.append(f"{spell(self.header(key, True))} {name}_text")
            if other:
                rules.append(json_rule(f"{name}_json", within(one, schema)))
                ways.append(
                    f"{spell(self.header(key, False))} {name}_json {spell(self.value_end + self.line)}"
                )
            rules.append(f"{name}: " + " | ".join(ways))
            body.append(name if key in required else f"{name}?")
        return " ".join(body), rules


class MarkupCallParser:
    """按 :class:`MarkupCalls` 读一个回答，边读边写成 JSON。"""

    def __init__(self, style: MarkupCalls, tools: Sequence[Tool]) -> None:
        self._style = style
        self._tools = {tool.name: tool for tool in tools}
        self._step: Callable[[], Parsed | None] = self._text
        self._held = ""
        self._raw = ""  # 没有读到名字的一次调用的原文
        self._count, self._keys = 0, 0
        self._tool: Tool | None = None
        self._is_text: bool | None = None
        self._value = ""

    def feed(self, piece: str) -> Parsed:
        """送入下一段。"""
        self._held += piece
        return drained(lambda: self._step())  # _step 读着读着会换成别的

    def flush(self) -> Parsed:
        """没有读到名字的原样算正文；值没有写完的就到这里。"""
        text, self._held = self._held, ""
        if self._step == self._text or (self._step in (self._section, self._name) and not self._count):
            return Parsed(self._raw + text)
        if self._step == self._string and text:
            return Parsed("", (CallDelta(self._count, arguments=_inside(text)),))
        if self._step == self._literal and self._value + text:
            return Parsed("", (CallDelta(self._count, arguments=self._value + text),))
        return Parsed("")

    def _text(self) -> Parsed | None:
        openings = [opening or self._style.call for opening in self._style.openings]
        before, marker, self._held = cut(self._held, openings)
        shown = before.rstrip()
        if marker:
            self._step = self._name if marker == self._style.call else self._section
            self._raw = marker
            return Parsed(shown)
        self._held = before[len(shown) :] + self._held  # 标记前面的空白不算正文，等看清楚
        return Parsed(shown) if shown else None

    def _section(self) -> Parsed | None:
        between, marker, self._held = cut(self._held, [self._style.call, *filter(None, self._style.closings)])
        self._raw += between + marker
        if not marker:
            return None
        if marker == self._style.call:
            self._step = self._name
        else:
            self._step, self._raw = self._text, ""
        return Parsed("")

    def _name(self) -> Parsed | None:
        # GLM 的名字后面什么标记也没有，到头一个参数或结尾为止。
        ends = (
            [self._style.name_end] if self._style.name_end else [self._style.parameter, self._style.call_end]
        )
        name, marker, rest = cut(self._held, ends)
        if not marker:
            return None
        self._held = rest if self._style.name_end else marker + rest
        self._raw, self._keys, self._step = "", 0, self._between
        self._tool = self._tools.get(name.strip())
        return Parsed("", (CallDelta(self._count, None, name.strip(), "{"),))

    def _between(self) -> Parsed | None:
        _, marker, self._held = cut(self._held, [self._style.parameter, self._style.call_end])
        if marker == self._style.parameter:
            self._step = self._header
            return Parsed("")
        if not marker:
            return None
        done = CallDelta(self._count, arguments="}", done=True)
        self._count += 1
        self._step = self._section if self._style.openings[0] else self._text
        return Parsed("", (done,))

    def _header(self) -> Parsed | None:
        header, marker, rest = cut(self._held, [self._style.header_end])
        if not marker:
            return None
        self._held, self._value = rest, ""
        key, is_text = self._style.read_header(header)
        if is_text is None:
            is_text = self._text_only(key)
        self._step = self._string if is_text else self._literal
        self._is_text = is_text
        comma = ", " if self._keys else ""
        self._keys += 1
        start = f"{comma}{to_json(key)}: " + ('"' if is_text else "")
        return Parsed("", (CallDelta(self._count, arguments=start),))

    def _string(self) -> Parsed | None:
        text, marker, self._held = cut(self._held, [self._style.value_end])
        if not (text or marker):
            return None
        if marker:
            self._step = self._between
        return Parsed("", (CallDelta(self._count, arguments=_inside(text) + ('"' if marker else "")),))

    def _literal(self) -> Parsed | None:
        text, marker, self._held = cut(self._held, [self._style.value_end])
        self._value += text
        if not marker:
            return None
        self._step = self._between
        return Parsed("", (CallDelta(self._count, arguments=_as_json(self._value)),))

    def _text_only(self, key: str) -> bool:
        if self._tool is None or not isinstance(
            properties := self._tool.parameters.get("properties"), Mapping
        ):
            return False
        return key in properties and text_kind(properties[key], self._tool.parameters) == (True, False)


def _inside(text: str) -> str:
    """JSON 字符串引号里面的。"""
    return to_json(text)[1:-1]


def _as_json(text: str) -> str:
    """本来就是 JSON 的原样给出，不是的当作字符串。"""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return to_json(text)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN 与 Infinity 不是 JSON


def _dsml(tag: str) -> tuple[str, str]:
    return f"<{DSML_TOKEN}{tag}", f"</{DSML_TOKEN}{tag}>"


_FUNCTIONS, _TOOLS = _dsml("function_calls"), _dsml("tool_calls")
_INVOKE, _PARAMETER = _dsml("invoke"), _dsml("parameter")

DSML = MarkupCalls(
    name="deepseek_v32",
    openings=(_FUNCTIONS[0] + ">", _TOOLS[0] + ">"),  # 后一种是 V4 的
    closings=(_FUNCTIONS[1], _TOOLS[1]),
    call=_INVOKE[0] + ' name="',
    name_end='">',
    call_end=_INVOKE[1],
    parameter=_PARAMETER[0] + ' name="',
    header_end='">',
    value_end=_PARAMETER[1],
    typed=True,
    markers=(DSML_TOKEN,),
    object_arguments=False,
)
_GLM_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


def _glm(name: str, line: str) -> MarkupCalls:
    return MarkupCalls(
        name=name,
        openings=("",),
        closings=("",),
        call=_GLM_TAGS[0],
        name_end="",
        call_end=_GLM_TAGS[1],
        parameter=_GLM_TAGS[2],
        header_end=_GLM_TAGS[4],
        value_end=_GLM_TAGS[5],
        typed=False,
        markers=_GLM_TAGS,
        object_arguments=True,
        line=line,
    )


#: GLM-4.5、4.6 各部分之间换行；GLM-4.7 起连着写。读起来一样。
GLM45, GLM47 = _glm("glm45", "\n"), _glm("glm47", "")
