"""认得、却还没有做的字段：给了会改变结果的值就拒绝，从不悄悄丢掉；表里没有的字段不认得，不理会。"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deepseek_export.serving.http.problems import ApiError

_OFF: tuple[Any, ...] = (None, False)
_NONE: tuple[Any, ...] = (None,)
_EMPTY: tuple[Any, ...] = (None, [], {})

#: 字段 → 不改变结果、因此可以给的值。
REQUEST_FIELDS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "audio": _NONE,
        "bad_words": _EMPTY,
        "best_of": (None, 1),
        "chat_template": _NONE,
        "documents": _EMPTY,
        "echo": _OFF,  # 对话的；续写有
        "function_call": (None, "none", "auto"),
        "guided_decoding_backend": _NONE,
        "guided_whitespace_pattern": _NONE,
        "functions": _EMPTY,
        "include_stop_str_in_output": _OFF,
        "length_penalty": (None, 1),
        "modalities": (None, ["text"]),
        "prompt_embeds": _NONE,
        "prompt_logprobs": _NONE,
        "return_token_ids": _OFF,
        "skip_special_tokens": (None, True),
        "suffix": (None, ""),
        "top_logprobs": (None, 0),  # 续写的；对话有
        "truncate_prompt_tokens": _NONE,
        "typical_p": (None, 1),
        "use_beam_search": _OFF,
        "verbosity": _NONE,
        "web_search_options": _NONE,
    }
)
#: 同上，一条消息里的。
MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = MappingProxyType({"audio": _NONE, "function_call": _NONE})


def refuse_unsupported(
    fields: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], where: str = ""
) -> None:
    """还没有做的字段给了会改变结果的值就拒绝。

    Args:
        fields: 请求里 dsx 没有用到的字段。
        table: :data:`REQUEST_FIELDS` 或 :data:`MESSAGE_FIELDS`。
        where: 字段所在的地方，例如 ``messages.0.``。

    Raises:
        ApiError: 400，写着是哪个字段。
    """
    for name, value in fields.items():
        harmless = table.get(name)
        if harmless is not None and not any(_same(value, one) for one in harmless):
            raise ApiError(
                400, f"还不支持 {where}{name}，去掉它再试", param=where + name, code="unsupported_parameter"
            )


def _same(value: Any, harmless: Any) -> bool:
    # 0 与 False、1 与 True 相等，却不是一个意思。
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)
