"""渲染检查点自带的聊天模板（Jinja），行为与 transformers 一致。"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_export.errors import DsxError


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
) -> str:
    """把对话渲染成一段提示词。

    模板来自检查点，是不可信的代码，所以在沙箱里跑：读不到 Python 内部属性，也改不了传入的对象。

    Args:
        template: Jinja 模板原文。
        messages: ``{"role": ..., "content": ...}`` 的序列。
        special_tokens: 模板可以用的 ``bos_token``、``eos_token`` 等。
        add_generation_prompt: 是否在末尾加上助手回合的开头。

    Raises:
        DsxError: ``DSX-E503``，模板语法错误、用到沙箱禁止的东西，或模板自己用 ``raise_exception`` 拒绝。
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except Exception as error:  # 模板是检查点带来的代码，TypeError 之类也会从里面冒出来
        raise DsxError(
            "DSX-E503",
            f"{type(error).__name__}：{error}",
            "检查消息的 role 与 content 是否符合模型的要求，或改用不套模板的原始提示词",
        ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    """不同于 Jinja 自带的 tojson：不转义 HTML，也不把中文写成 \\u。"""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
