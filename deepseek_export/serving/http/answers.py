"""回答的 JSON：整个的、流式的一块一块的；两个端点各一种样子。"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from deepseek_export.serving.http.reasoning import Parts
from deepseek_export.serving.http.scores import ScoredToken, chat_scores, completion_scores
from deepseek_export.serving.http.turn import FinishReason, Piece

#: 一段文本里的 token 的对数概率；没有要就是 ``None``。
Scores: TypeAlias = Sequence[ScoredToken] | None


class Form(Protocol):
    """一个端点的回答长什么样。

    Attributes:
        source: 输入是请求的哪个字段。
        prefix: 回答的 id 以它开头。
        whole, chunk: 整个回答与流式一块的 ``object``。
    """

    source: str
    prefix: str
    whole: str
    chunk: str

    def opening(self) -> Mapping[str, Any] | None:
        """流式的头一块；没有就是 ``None``。"""

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """流式的各块，不含 ``index``。"""

    def choice(self, text: str, reasoning: str, scores: Scores) -> Mapping[str, Any]:
        """整个的一个回答，不含 ``index`` 与 ``finish_reason``。"""


class ChatForm:
    """``/v1/chat/completions``。"""

    source, prefix = "messages", "chatcmpl-"
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def opening(self) -> Mapping[str, Any]:
        """头一块带着角色。"""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """思考、文本、结束的原因各一块，次序与 OpenAI、DeepSeek 相同；对数概率在最前面的那一块里。"""
        scores = chat_scores(piece.scores) if piece.scores else None
        if piece.reasoning:
            yield {"delta": _thought(piece.reasoning), "logprobs": scores, "finish_reason": None}
            scores = None
        if piece.text or scores is not None:  # 思考的标记没有文本，它们的 token 也有对数概率
            yield {"delta": {"content": piece.text}, "logprobs": scores, "finish_reason": None}
        if piece.finish is not None:
            yield {"delta": {}, "logprobs": None, "finish_reason": piece.finish}

    def choice(self, text: str, reasoning: str, scores: Scores) -> Mapping[str, Any]:
        """一条消息。"""
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if scores is None else chat_scores(scores)
        return {"message": message | _thought(reasoning), "logprobs": logprobs}


class CompletionForm:
    """``/v1/completions``。"""

    source, prefix = "prompt", "cmpl-"
    whole, chunk = "text_completion", "text_completion"

    def opening(self) -> None:
        """没有头一块。"""

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """文本与结束的原因在同一块。"""
        if piece.text or piece.scores or piece.finish is not None:
            scores = completion_scores(piece.scores) if piece.scores else None
            yield {"text": piece.text, "logprobs": scores, "finish_reason": piece.finish}

    def choice(self, text: str, reasoning: str, scores: Scores) -> Mapping[str, Any]:
        """一段文本；续写不分思考。"""
        return {"text": text, "logprobs": None if scores is None else completion_scores(scores)}


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

    def whole(
        self,
        parts: Sequence[Parts],
        scores: Sequence[Scores],
        finishes: Sequence[FinishReason | None],
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        """整个回答。"""
        choices = [
            {"index": index, **self.form.choice(part.content, part.reasoning, score), "finish_reason": finish}
            for index, (part, score, finish) in enumerate(zip(parts, scores, finishes, strict=True))
        ]
        return {**self._head(self.form.whole), "choices": choices, "usage": usage}

    def openings(self, count: int) -> Iterator[dict[str, Any]]:
        """流式的头几块，每个回答一块。"""
        opening = self.form.opening()
        if opening is not None:
            for index in range(count):
                yield self._chunk([{"index": index, **opening}], None)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """一段文本变成的各块，可能一块也没有。"""
        for part in self.form.parts(piece):
            yield self._chunk([{"index": piece.index, **part}], None)

    def usage(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """用量的那一块，``choices`` 是空的。"""
        return self._chunk([], usage)

    def _chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None) -> dict[str, Any]:
        chunk = {**self._head(self.form.chunk), "choices": choices}
        return {**chunk, "usage": usage} if self.usage_chunk else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.form.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
