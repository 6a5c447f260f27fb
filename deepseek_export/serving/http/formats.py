"""一个模型的格式：对话怎么写成提示词、回答怎么读、怎么约束。"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_export.errors import DsxError
from deepseek_export.formats.calls import Tool, ToolFormat, ToolParser
from deepseek_export.formats.chat import TOOL_FORMATS, find_tool_format, prepared
from deepseek_export.formats.grammar import Grammar, Grammars, thought_rule
from deepseek_export.formats.lark import ANY_TEXT, escaped, speller, until
from deepseek_export.formats.limits import check_schema
from deepseek_export.runtime import BundleTokenizer
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.reasoning import TAGS, begins_thinking
from deepseek_export.serving.http.schemas import ChatRequest, Message, as_template
from deepseek_export.serving.http.structured import Constraint

#: 关掉思考的 ``reasoning_effort``。
_NO_EFFORT = frozenset({"none", "minimal"})
#: 模板里管思考的开关。
_SWITCHES = ("thinking", "enable_thinking")


@dataclass(frozen=True)
class Reading:
    """一个回答怎么读。

    Attributes:
        begun: 提示词有没有替回答开了思考的头。
        style: 工具调用的格式；``None`` 不找调用。
        tools: 给了哪些工具。
        single: 只许调用一次。
        kept: 解码时要留着的特殊 token。
    """

    begun: bool
    style: ToolFormat | None = None
    tools: tuple[Tool, ...] = ()
    single: bool = False
    kept: tuple[str, ...] = TAGS

    def parser(self) -> ToolParser | None:
        """每个回答一个。"""
        return None if self.style is None else self.style.parser(self.tools)


class ModelFormats:
    """随分词器而定，加载时建一次。

    Args:
        tokenizer: 分词器。
        vocab_size: logits 的宽度。
        eos_token_ids: 结束的 token。
        tool_parser: ``--tool-parser``；``None`` 由聊天模板看出来。
    """

    def __init__(
        self,
        tokenizer: BundleTokenizer,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        tool_parser: str | None = None,
    ) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, tuple(eos_token_ids)
        template = tokenizer.chat_template
        self.style = (
            TOOL_FORMATS[tool_parser] if tool_parser else find_tool_format(template, tokenizer.has_token)
        )
        self._spell = speller(tokenizer.special_ids)
        self._thinks = template is None or TAGS[0] in template
        self._lock = threading.Lock()
        self._grammars: Grammars | None = None

    def text(self, body: ChatRequest) -> str:
        """对话套上模板。

        Raises:
            DsxError: ``DSX-E502`` / ``DSX-E503``，没有聊天模板，或渲染失败；``DSX-E764``，消息里的调用不对；``DSX-E765``，
                不知道模型怎么写工具调用。
            ApiError: 400，模板不认得 ``reasoning_effort``，或没有可以接着写的消息。
        """
        tools = body.offered
        if tools:
            self._needs_style("tools")
        messages = prepared(as_template(body.messages), tools, self._tokenizer.chat_template, self.style)
        goes_on = bool(body.continue_final_message)
        add = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
        extra = self._extra(body)
        text = self._tokenizer.apply_chat_template(messages, add, [tool.as_openai for tool in tools], extra)
        return _cut_at_the_end(text, body.messages[-1]) if goes_on else text

    def reading(self, body: ChatRequest, text: str) -> Reading:
        """回答怎么读；``text`` 是套过模板的提示词。"""
        tools = tuple(body.offered)
        style = self.style if tools else None
        kept = TAGS if style is None else (*TAGS, *style.markers)
        return Reading(begins_thinking(text), style, tools, body.parallel_tool_calls is False, kept)

    def grammar(self, constraint: Constraint | None, body: ChatRequest | None, text: str) -> Grammar | None:
        """约束输出的语法；不约束是 ``None``。

        Args:
            constraint: ``response_format`` 等要的。
            body: 对话；续写是 ``None``，不分思考，也没有工具。
            text: 套过模板的提示词。

        Raises:
            ApiError: 400，语法用不了，写着是哪个字段；既要约束输出，又要调用工具。
            DsxError: ``DSX-E761``，没有装 llguidance。
        """
        wanted = constraint if body is None else self._with_calls(constraint, body)
        if wanted is None:
            return None
        thought = None
        if (
            body is not None
            and not text.rstrip().endswith(TAGS[1])
            and (begins_thinking(text) or self._thinks)
        ):
            thought = thought_rule(self._spell, begins_thinking(text))
        try:
            return self._all().compile(wanted.lark, thought, wanted.inner)
        except DsxError as error:
            raise ApiError.of(error, wanted.field) from error

    def _with_calls(self, constraint: Constraint | None, body: ChatRequest) -> Constraint | None:
        forced = body.forced
        if not forced:
            if constraint is not None:
                return self._calls_or(constraint, body) if body.offered else constraint
            return self._calls_or_text(body) if any(tool.strict for tool in body.offered) else None
        if constraint is not None:
            what = f"{constraint.field} 与必须调用工具的 tool_choice 不能一起给"
            raise ApiError(400, what, param="tool_choice", code="invalid_value")
        parallel = body.tool_choice == "required" and body.parallel_tool_calls is not False
        style, rules = self._rules(forced, parallel)
        return Constraint(f"start: {self._spell(style.opening)} calls\n{rules}", "tools")

    def _rules(self, tools: Sequence[Tool], parallel: bool) -> tuple[ToolFormat, str]:
        style = self._needs_style("tools")
        try:
            for tool in tools:
                check_schema(tool.parameters)
        except DsxError as error:
            raise ApiError.of(error, "tools") from error
        return style, style.rules(tools, parallel, self._spell)

    def _calls_or(self, constraint: Constraint, body: ChatRequest) -> Constraint:
        """既约束输出又可以调用工具：要么调用，要么照着约束说。"""
        style, rules = self._rules(body.offered, body.parallel_tool_calls is not False)
        lark = f"start: @inner | {self._spell(style.opening)} calls\n{rules}"
        return Constraint(lark, constraint.field, constraint.lark)

    def _calls_or_text(self, body: ChatRequest) -> Constraint:
        """有 ``strict`` 的工具而不必调用：随便写，一旦开始调用就要合乎 schema。"""
        style, rules = self._rules(body.offered, body.parallel_tool_calls is not False)
        opening = until("opening", ANY_TEXT, style.opening, self._spell)
        marker = self._spell(style.opening)
        plain = (
            "free: /(.|\\n)*/"
            if marker.startswith("<[")
            else f"free: FREE\nFREE: /(.|\\n)*/ & ~/{ANY_TEXT}{escaped(style.opening)}{ANY_TEXT}/"
        )
        return Constraint(f"start: free | opening calls\n{plain}\n{opening}\n{rules}", "tools")

    def _extra(self, body: ChatRequest) -> dict[str, Any]:
        extra = dict(body.chat_template_kwargs or {})
        effort, template = body.reasoning_effort, self._tokenizer.chat_template
        if effort is None:
            return extra
        if template is not None and "reasoning_effort" in template:
            return {"reasoning_effort": effort, **extra}
        switches = [name for name in _SWITCHES if template is None or re.search(rf"\b{name}\b", template)]
        if not switches:
            if self._thinks == (effort not in _NO_EFFORT):  # 本来就是这样
                return extra
            raise ApiError(
                400,
                "这个模型的聊天模板不认得 reasoning_effort，也没有思考的开关，去掉它再试",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        return {switches[0]: effort not in _NO_EFFORT, **extra}

    def _needs_style(self, field: str) -> ToolFormat:
        if self.style is None:
            error = DsxError(
                "DSX-E765",
                "聊天模板与词表里看不出模型怎么写工具调用",
                f"dsx serve 加 --tool-parser（{'、'.join(TOOL_FORMATS)}），或去掉 tools",
            )
            raise ApiError.of(error, field)
        return self.style

    def _all(self) -> Grammars:
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer.source, self._vocab_size, self._eos)
            return self._grammars


def _cut_at_the_end(text: str, last: Message) -> str:
    """去掉模板加在最后一条消息之后的，让模型接着写它。"""
    said = last.text.strip()
    at = text.rfind(said)
    if last.role != "assistant" or not said or at < 0:
        raise ApiError(
            400,
            "continue_final_message 要最后一条消息是 assistant 的，有 content，而且模板原样写出它",
            param="continue_final_message",
            code="invalid_value",
        )
    return text[: at + len(said)]
