"""对话的回答里，思考与答案分开：``<think>`` 与 ``</think>`` 之间的是思考。"""

from __future__ import annotations

from typing import NamedTuple

#: 思考的开头与结尾。
TAGS = _OPEN, _CLOSE = "<think>", "</think>"


def begins_thinking(prompt: str) -> bool:
    """提示词的末尾是不是已经替回答开了头（R1 的模板就是）。"""
    return prompt.rstrip().endswith(_OPEN)


class Parts(NamedTuple):
    """一段文本里的思考与答案，都可能为空串。"""

    reasoning: str
    content: str


class ReasoningSplit:
    """一个回答，文本一段一段地来；可能是标记的那几个字先攥着，怎么切段不改变结果。

    1. 回答以 ``<think>`` 开头（前面可以有空白）：到 ``</think>`` 为止是思考，之后是答案。
    2. 提示词已经开了头：同上，回答里不必再有 ``<think>``。
    3. 都没有：全是答案，其中的 ``</think>`` 也是。

    标记不给出来，紧跟着它的换行也不给。

    Args:
        begun: 提示词是不是已经开了头。
    """

    def __init__(self, begun: bool) -> None:
        self._begun = begun
        self._state = "start"
        self._held = ""
        self._after_tag = False

    def feed(self, piece: str) -> Parts:
        """送入下一段，返回因此能给出的。"""
        self._held += piece
        reasoning = ""
        if self._state == "start":
            body = self._held.lstrip()
            if len(body) < len(_OPEN) and _OPEN.startswith(body):
                return Parts("", "")
            opened = body.startswith(_OPEN)
            self._state = "thinking" if opened or self._begun else "answering"
            if opened:
                self._held, self._after_tag = body.removeprefix(_OPEN), True
        if self._state == "thinking":
            self._drop_newlines()
            before, closed, after = self._held.partition(_CLOSE)
            if not closed:
                return Parts(self._take(_overlap(self._held)), "")
            reasoning, self._held = before, after
            self._state, self._after_tag = "answering", True
        self._drop_newlines()
        return Parts(reasoning, self._take(0))

    @property
    def thinking(self) -> bool:
        """正在思考。"""
        return self._state == "thinking"

    def flush(self) -> Parts:
        """回答结束了：攥着的也给出来。"""
        text = self._take(0)
        thinking = self._state == "thinking" or (self._state == "start" and self._begun)
        return Parts(text, "") if thinking else Parts("", text)

    def _drop_newlines(self) -> None:
        if self._after_tag:
            self._held = self._held.lstrip("\n")
            self._after_tag = not self._held

    def _take(self, kept: int) -> str:
        """取走攥着的，末尾 ``kept`` 个字留下。"""
        at = len(self._held) - kept
        text, self._held = self._held[:at], self._held[at:]
        return text


def _overlap(text: str) -> int:
    """末尾有多少个字可能是 ``</think>`` 的开头。"""
    return next((n for n in range(len(_CLOSE) - 1, 0, -1) if text.endswith(_CLOSE[:n])), 0)
