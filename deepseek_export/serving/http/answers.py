"""回答的 JSON：整个的、流式的一块一块的；两个端点各一种样子。"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek_export.formats.calls import CallDelta, ToolCall
from deepseek_export.serving.http.problems import ApiError, json_bytes
from deepseek_export.serving.http.said import Said
from deepseek_export.serving.http.scores import chat_scores, completion_scores
from deepseek_export.serving.http.turn import Choice, Piece

Usage = Mapping[str, Any]
#: OpenAI 的流的末尾。
DONE = b"data: [DONE]\n\n"


def event(body: Mapping[str, Any], name: str | None = None) -> bytes:
    """一个 SSE 事件；``name`` 是事件的名字，OpenAI 旧的两个端点没有。"""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(body) + b"\n\n"


class Form(Protocol):
    """一个端点的回答长什么样。

    Attributes:
        prefix: 回答的 id 以它开头。
        whole, chunk: 整个回答与流式一块的 ``object``。
    """

    prefix: str
    whole: str
    chunk: str

    def opening(self) -> Mapping[str, Any] | None:
        """流式的头一块；没有就是 ``None``。"""

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """流式的各块，不含 ``index``。"""

    def choice(self, said: Said) -> Mapping[str, Any]:
        """整个的一个回答，不含 ``index`` 与 ``finish_reason``。"""


class Answering(Protocol):
    """一次请求的回答怎么写；每种协议一个。流式的各个方法给出的都是现成的 SSE。

    Attributes:
        model: 模型名。
    """

    @property
    def model(self) -> str:
        """模型名。"""

    def whole(self, said: Sequence[Said], choices: Sequence[Choice], usage: Usage) -> Mapping[str, Any]:
        """整个回答。"""

    def began(self, count: int, usage: Usage) -> Iterator[bytes]:
        """流式的开头；``count`` 个回答，``usage`` 里只有提示词的。"""

    def said(self, piece: Piece) -> Iterator[bytes]:
        """一段变成的各个事件，可能一个也没有。"""

    def ended(self, choices: Sequence[Choice], usage: Usage) -> Iterator[bytes]:
        """全部做完了。"""

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """开始之后出的错，到此为止。"""


class ChatForm:
    """``/v1/chat/completions``。"""

    prefix = "chatcmpl-"
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def opening(self) -> Mapping[str, Any]:
        """头一块带着角色。"""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """思考、文本、调用的碎片、结束的原因各一块，次序与 OpenAI、DeepSeek 相同；对数概率在最前面的那一块里。"""
        scores = chat_scores(piece.scores) if piece.scores else None
        if piece.reasoning:
            yield {"delta": _thought(piece.reasoning), "logprobs": scores, "finish_reason": None}
            scores = None
        if piece.text or scores is not None:  # 思考、调用的标记没有文本，它们的 token 也有对数概率
            yield {"delta": {"content": piece.text}, "logprobs": scores, "finish_reason": None}
        for call in piece.calls:
            yield {"delta": {"tool_calls": [_fragment(call)]}, "logprobs": None, "finish_reason": None}
        if piece.finish is not None:
            yield {"delta": {}, "logprobs": None, "finish_reason": piece.finish}

    def choice(self, said: Said) -> Mapping[str, Any]:
        """一条消息；只有调用、没有正文时 ``content`` 是 ``null``。"""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": said.content or (None if said.calls else ""),
            "refusal": None,
            **_thought(said.reasoning),
        }
        if said.calls:
            message["tool_calls"] = [_call(call) for call in said.calls]
        return {"message": message, "logprobs": None if said.scores is None else chat_scores(said.scores)}


class CompletionForm:
    """``/v1/completions``。"""

    prefix = "cmpl-"
    whole, chunk = "text_completion", "text_completion"

    def opening(self) -> None:
        """没有头一块。"""

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """文本与结束的原因在同一块。"""
        if piece.text or piece.scores or piece.finish is not None:
            scores = completion_scores(piece.scores) if piece.scores else None
            yield {"text": piece.text, "logprobs": scores, "finish_reason": piece.finish}

    def choice(self, said: Said) -> Mapping[str, Any]:
        """一段文本；续写不分思考。"""
        scores = None if said.scores is None else completion_scores(said.scores)
        return {"text": said.content, "logprobs": scores}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _fragment(delta: CallDelta) -> dict[str, Any]:
    """头一段带着 id 与名字，之后只有参数的碎片。"""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **_call(ToolCall(delta.id or "", delta.name, delta.arguments))}


def _thought(reasoning: str) -> dict[str, str]:
    """两个名字都给：DeepSeek、SGLang、llama.cpp 用前一个，vLLM 改成了后一个。"""
    return {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}


@dataclass(frozen=True)
class Answer:
    """一次请求的回答：id、时间、模型名在各块里都一样。

    Attributes:
        form: 哪个端点的。
        model: 模型名。
        usage_chunk: 流式的最后另发一块用量；这时别的块里 ``usage`` 是 ``null``。
        created: Unix 时间，秒。
        id: 回答的 id。
    """

    form: Form
    model: str
    usage_chunk: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, said: Sequence[Said], choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """整个回答。"""
        made = [
            {"index": choice.index, **self.form.choice(one), "finish_reason": choice.finish}
            for one, choice in zip(said, choices, strict=True)
        ]
        return {**self._head(self.form.whole), "choices": made, "usage": usage}

    def began(self, count: int, usage: Usage) -> Iterator[bytes]:
        """头几块，每个回答一块。"""
        opening = self.form.opening()
        if opening is not None:
            for index in range(count):
                yield self._chunk([{"index": index, **opening}], None)

    def said(self, piece: Piece) -> Iterator[bytes]:
        """一段文本变成的各块，可能一块也没有。"""
        for part in self.form.parts(piece):
            yield self._chunk([{"index": piece.index, **part}], None)

    def ended(self, choices: Sequence[Choice], usage: Usage) -> Iterator[bytes]:
        """要用量就有一块 ``choices`` 是空的；最后是 ``[DONE]``。"""
        if self.usage_chunk:
            yield self._chunk([], usage)
        yield DONE

    def failed(self, error: ApiError) -> Iterator[bytes]:
        """一个错误的事件，之后仍是 ``[DONE]``。"""
        yield event(error.body)
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None) -> bytes:
        chunk = {**self._head(self.form.chunk), "choices": choices}
        return event({**chunk, "usage": usage} if self.usage_chunk else chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.form.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
