"""一个回答到现在为止说了什么：思考、正文、工具调用。"""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseek_export.formats.calls import ToolCall
from deepseek_export.serving.http.scores import ScoredToken
from deepseek_export.serving.http.turn import Choice, Piece


@dataclass
class Said:
    """一段一段地攒。

    Attributes:
        reasoning: 思考。
        content: 正文。
        calls: 调用，次序与文本里相同。
        scores: 各个 token 的对数概率；没有要就是 ``None``。
    """

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    scores: list[ScoredToken] | None = None

    @classmethod
    def of(cls, choice: Choice) -> Said:
        """这个回答的，还什么都没有说。"""
        return cls(scores=None if choice.order.sampling.logprobs is None else [])

    def add(self, piece: Piece) -> None:
        """又来了一段。"""
        self.reasoning += piece.reasoning
        self.content += piece.text
        if self.scores is not None:
            self.scores.extend(piece.scores or ())
        for delta in piece.calls:
            if delta.name is not None:
                self.calls.append(ToolCall(delta.id or "", delta.name, ""))
            call = self.calls[delta.index]
            self.calls[delta.index] = ToolCall(call.id, call.name, call.arguments + delta.arguments)
