"""一行的 token 序列，采样的处理器看的就是它：不变的开头与会换掉的草稿分得开，所以谁都不必每步从头看一遍。"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class History(list[int]):
    """提示词加生成的 token；前 :attr:`confirmed` 个不会再变，之后的是正在验证的草稿。

    Args:
        prompt: 提示词。

    Attributes:
        confirmed: 前几个不会再变。
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        super().__init__(prompt)
        self.confirmed = len(self)

    def drop_drafts(self) -> None:
        """草稿不要了。"""
        del self[self.confirmed :]

    def confirm(self, tokens: Iterable[int]) -> None:
        """草稿不要了，接上选定的 ``tokens``。"""
        self.drop_drafts()
        self.extend(tokens)
        self.confirmed = len(self)


class Follower:
    """跟着一条序列走：每次只看上一次之后可能变了的部分。

    问的是 :class:`History` 时，每步的工作只随新来的与草稿，不随全长；别的序列从头比，换一条来问结果也对。
    """

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._sure = 0
        self._last: Sequence[int] | None = None

    def follow(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """与上一次比。

        Returns:
            ``(退掉的, 新来的)``：上一次的末尾去掉前者，再接上后者，就是 ``tokens``。
        """
        start = min(self._sure, len(self._seen), len(tokens)) if tokens is self._last else 0
        end = min(len(self._seen), len(tokens))
        kept = next((at for at in range(start, end) if self._seen[at] != tokens[at]), end)
        gone, new = self._seen[kept:], list(tokens[kept:])
        self._seen[kept:] = new
        self._last = tokens if isinstance(tokens, History) else None
        self._sure = tokens.confirmed if isinstance(tokens, History) else 0
        return gone, new
