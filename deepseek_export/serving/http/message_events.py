"""``/v1/messages`` 的回答：整个的，与 Anthropic 那样次序的流式事件。"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

from deepseek_export.serving.http.answers import Usage, event
from deepseek_export.serving.http.blocks import Block, Blocks, blocks_of
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.said import Said
from deepseek_export.serving.http.turn import Choice

_REASONS = MappingProxyType({"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"})
_DELTA = MappingProxyType(
    {
        "text": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }
)


class MessagesAnswer(Blocks):
    """一次请求的回答。

    Args:
        model: 模型名。
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self._id = f"msg_{secrets.token_hex(12)}"

    def whole(self, said: Sequence[Said], choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """整个回答；参数没有写完的调用（到了 ``max_tokens``）没法调用，不列。"""
        content = [made for block in blocks_of(said[0]) if (made := _block(block)) is not None]
        return self._message(content, _usage(usage)) | _stop(choices[0])

    def began(self, count: int, usage: Usage) -> Iterator[bytes]:
        """``message_start``。"""
        yield _event("message_start", message=self._message([], _usage(usage)))

    def opened(self, block: Block) -> Iterator[bytes]:
        """``content_block_start``。"""
        empty = {
            "text": {"type": "text", "text": ""},
            "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
            "call": {"type": "tool_use", "id": block.id, "name": block.name, "input": {}},
        }
        yield _event("content_block_start", index=self._at, content_block=empty[block.kind])

    def grew(self, block: Block, text: str) -> Iterator[bytes]:
        """``content_block_delta``。"""
        kind, key = _DELTA[block.kind]
        yield _event("content_block_delta", index=self._at, delta={"type": kind, key: text})

    def closed(self, block: Block) -> Iterator[bytes]:
        """``content_block_stop``；思考之后有签名，这里是空的。"""
        if block.kind == "reasoning":
            signature = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=self._at, delta=signature)
        yield _event("content_block_stop", index=self._at)

    def ended(self, choices: Sequence[Choice], usage: Usage) -> Iterator[bytes]:
        """``message_delta`` 与 ``message_stop``。"""
        yield from self.close()
        yield _event("message_delta", delta=_stop(choices[0]), usage=_usage(usage))
        yield _event("message_stop")

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """``error``，到此为止。"""
        yield event(error.anthropic, "error")

    @property
    def _at(self) -> int:
        return len(self.blocks) - 1

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def _block(block: Block) -> dict[str, Any] | None:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    try:
        return {
            "type": "tool_use",
            "id": block.id,
            "name": block.name,
            "input": json.loads(block.text or "{}"),
        }
    except (ValueError, RecursionError):
        return None


def _stop(choice: Choice) -> dict[str, Any]:
    reason = "stop_sequence" if choice.stopped_by is not None else _REASONS[choice.finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": choice.stopped_by}


def _usage(usage: Usage) -> dict[str, int]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }
