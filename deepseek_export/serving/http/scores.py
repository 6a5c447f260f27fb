"""对数概率在回答里的样子：两个端点各一种，都是 OpenAI 的。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_export.runtime import TokenLogprobs

#: 概率为 0 的：JSON 写不了负无穷，OpenAI 也是这个数。
_LOWEST = -9999.0


@dataclass(frozen=True)
class ScoredToken:
    """文本里的一个 token。

    Attributes:
        data: 它的字节，不一定是完整的字符。
        logprob: 它的对数概率。
        top: 最可能的几个的字节与对数概率，从大到小。
        offset: 它的文本从第几个字符开始。
    """

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int

    @classmethod
    def of(cls, scores: TokenLogprobs, bytes_of: Callable[[int], bytes], offset: int) -> ScoredToken:
        """``bytes_of`` 给出一个 token 的字节。"""
        top = tuple((bytes_of(token), value) for token, value in scores.top)
        return cls(bytes_of(scores.token), scores.logprob, top, offset)


def chat_scores(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """``/v1/chat/completions`` 的 ``logprobs``。"""
    content = [
        {
            **_entry(token.data, token.logprob),
            "top_logprobs": [_entry(data, value) for data, value in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_scores(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """``/v1/completions`` 的 ``logprobs``；选出来的总在 ``top_logprobs`` 里。"""
    return {
        "tokens": [_legacy(token.data) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {_legacy(data): _finite(value) for data, value in (*token.top, (token.data, token.logprob))}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    text = data.decode("utf-8", "backslashreplace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _legacy(data: bytes) -> str:
    """不成字符的写成 ``bytes:\\xe6\\x98``。"""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(value: float) -> float:
    return max(value, _LOWEST)
