"""``/v1/responses`` 的回答：整个的，与 OpenAI 那样次序的流式事件。"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepseek_export.serving.http.answers import Usage, event
from deepseek_export.serving.http.blocks import Block, Blocks, blocks_of
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.responses import ResponsesRequest
from deepseek_export.serving.http.said import Said
from deepseek_export.serving.http.turn import Choice

#: 块 → 它里面那一段的 ``type``，与事件的名字。
_PART = {"reasoning": "reasoning_text", "text": "output_text"}
_PREFIX = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}


class ResponsesAnswer(Blocks):
    """一次请求的回答。

    Args:
        body: 请求；其中的参数在回答里照样说一遍。
        model: 模型名。
    """

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        super().__init__()
        self.model = model
        self._body, self._id, self._created = body, f"resp_{secrets.token_hex(16)}", int(time.time())
        self._number = 0
        self._ids: list[str] = []

    def whole(self, said: Sequence[Said], choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """整个回答。"""
        blocks = blocks_of(said[0]) or [Block("text")]
        items = [_item(block, _new_id(block), "completed") for block in blocks]
        return self._response(items, choices, usage)

    def began(self, count: int, usage: Usage) -> Iterator[bytes]:
        """``response.created`` 与 ``response.in_progress``。"""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response([], None, None))

    def opened(self, block: Block) -> Iterator[bytes]:
        """新的一项；文本的里面还有一段。"""
        self._ids.append(_new_id(block))
        item = _item(block, self._ids[-1], "in_progress") | ({} if block.kind == "call" else {"content": []})
        yield self._event("response.output_item.added", output_index=self._at, item=item)
        if block.kind != "call":
            yield self._event("response.content_part.added", **self._place(block), part=_part(block))

    def grew(self, block: Block, text: str) -> Iterator[bytes]:
        """多了一段文本，或一段参数。"""
        name = "function_call_arguments" if block.kind == "call" else _PART[block.kind]
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        yield self._event(f"response.{name}.delta", **self._place(block), delta=text, **extra)

    def closed(self, block: Block) -> Iterator[bytes]:
        """这一项完了。"""
        place = self._place(block)
        if block.kind == "call":
            done = {"name": block.name, "arguments": block.text}
            yield self._event("response.function_call_arguments.done", **place, **done)
        else:
            extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(f"response.{_PART[block.kind]}.done", **place, text=block.text, **extra)
            yield self._event("response.content_part.done", **place, part=_part(block))
        item = _item(block, self._ids[-1], "completed")
        yield self._event("response.output_item.done", output_index=self._at, item=item)

    def ended(self, choices: Sequence[Choice], usage: Usage) -> Iterator[bytes]:
        """最后是 ``response.completed``，没有说完的是 ``response.incomplete``。"""
        if not self.blocks:
            self.blocks.append(Block("text"))
            yield from self.opened(self.blocks[-1])
            yield from self.closed(self.blocks[-1])
        yield from self.close()
        items = [_item(block, name, "completed") for block, name in zip(self.blocks, self._ids, strict=True)]
        response = self._response(items, choices, usage)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """``response.failed``，到此为止。"""
        code = str(error.code) if error.code is not None else "server_error"
        response = self._response([], None, None)
        response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("response.failed", response=response)

    @property
    def _at(self) -> int:
        return len(self._ids) - 1

    def _place(self, block: Block) -> dict[str, Any]:
        place = {"item_id": self._ids[-1], "output_index": self._at}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        return event(body, kind)

    def _response(
        self, items: list[dict[str, Any]], choices: Sequence[Choice] | None, usage: Usage | None
    ) -> dict[str, Any]:
        """``choices`` 是 ``None`` 就还在做。"""
        body = self._body
        cut = choices is not None and choices[0].finish == "length"
        status = "in_progress" if choices is None else "incomplete" if cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }


def _new_id(block: Block) -> str:
    return _PREFIX[block.kind] + secrets.token_hex(16)


def _item(block: Block, name: str, status: str) -> dict[str, Any]:
    if block.kind == "call":
        return {
            "id": name,
            "type": "function_call",
            "status": status,
            "call_id": block.id,
            "name": block.name,
            "arguments": block.text,
        }
    if block.kind == "reasoning":
        return {"id": name, "type": "reasoning", "status": status, "summary": [], "content": [_part(block)]}
    return {
        "id": name,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(block)],
    }


def _part(block: Block) -> dict[str, Any]:
    part: dict[str, Any] = {"type": _PART[block.kind], "text": block.text}
    return part | {"annotations": [], "logprobs": []} if block.kind == "text" else part


def _format(body: ResponsesRequest) -> Mapping[str, Any]:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return {"type": "text"}
    return wanted.model_dump(by_alias=True, exclude_none=True)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": dict(usage["prompt_tokens_details"]),
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": dict(usage["completion_tokens_details"]),
        "total_tokens": usage["total_tokens"],
    }
