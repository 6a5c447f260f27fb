"""Python 接口收到的提示词：文本，或 token id；写错了的说是哪一个、怎么写。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

from deepseek_export.checkpoint.fields import shown
from deepseek_export.errors import DsxError


def prompt_rows(prompts: Any, chat: bool) -> list[str | list[int]]:
    """几条提示词：每条是文本，或一串 token id；一条文本也可以直接给。

    Raises:
        DsxError: ``DSX-E702``，别的写法。
    """
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        raise _refused("prompts", prompts)
    return [prompt_row(prompt, chat, f"prompts[{number}]") for number, prompt in enumerate(prompts)]


def prompt_row(prompt: Any, chat: bool, where: str = "prompt") -> str | list[int]:
    """一条提示词；``where`` 是报错时怎么称呼它。

    Raises:
        DsxError: ``DSX-E702``，别的写法，或 ``chat`` 为真而给的是 token id。
    """
    if isinstance(prompt, str):
        return prompt
    if not _is_list(prompt):
        raise _refused(where, prompt)
    if chat:
        todo = "chat=True 给文本；要给 token id 就去掉 chat=True，自己先套好模板"
        raise DsxError("DSX-E702", f"chat=True，而 {where} 是 token id", todo)
    return [_token_id(f"{where}[{at}]", token) for at, token in enumerate(prompt)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)


def _token_id(where: str, token: Any) -> int:
    try:
        return index(token)
    except TypeError as error:
        raise _refused(where, token) from error


def _refused(where: str, value: Any) -> DsxError:
    todo = '给一条文本 "床前明月光"，几条文本 ["春", "秋"]，或几条 token id [[1, 2, 3]]'
    if not where.startswith("prompts"):
        todo = '给一条文本 "床前明月光"，或一串 token id [1, 2, 3]'
    if isinstance(value, Mapping):
        todo = "对话先套模板：generate(model.tokenizer.apply_chat_template(messages))；只有一句话就直接给文本，加 chat=True"
    elif where.startswith("prompts") and not isinstance(value, Iterable) and value is not None:
        todo += "；一条也要套一层列表"
    return DsxError("DSX-E702", f"{where} 是 {shown(value)}（{type(value).__name__}）", todo)
