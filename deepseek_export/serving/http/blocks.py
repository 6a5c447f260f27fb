"""``/v1/responses`` 与 ``/v1/messages`` 的回答都是一块一块的：思考、正文、一次一次的调用；这里只管块的开合。"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deepseek_export.formats.calls import CallDelta
from deepseek_export.serving.http.said import Said
from deepseek_export.serving.http.turn import Piece

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """一块。

    Attributes:
        kind: 哪一种。
        text: 到现在为止的文本；调用的是 ``arguments``。
        id: 调用的 id。
        name: 调用的函数。
    """

    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


def blocks_of(said: Said) -> list[Block]:
    """说完了的回答分成几块；空的不算。"""
    blocks = [Block("reasoning", said.reasoning), Block("text", said.content)]
    calls = [Block("call", call.arguments, call.id, call.name) for call in said.calls]
    return [*(block for block in blocks if block.text), *calls]


class Blocks(ABC):
    """流式地开合；子类写各个事件。"""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._key: tuple[Kind, int] | None = None

    def said(self, piece: Piece) -> Iterator[bytes]:
        """一段变成的各个事件，可能一个也没有。"""
        for kind, delta, text in _parts(piece):
            key = (kind, 0 if delta is None else delta.index)
            if key != self._key:
                yield from self.close()
                self._key = key
                block = Block(kind)
                if delta is not None:
                    block.id, block.name = delta.id or "", delta.name or ""
                self.blocks.append(block)
                yield from self.opened(block)
            if text:
                self.blocks[-1].text += text
                yield from self.grew(self.blocks[-1], text)

    def close(self) -> Iterator[bytes]:
        """开着的那一块完了。"""
        if self._key is not None:
            self._key = None
            yield from self.closed(self.blocks[-1])

    @abstractmethod
    def opened(self, block: Block) -> Iterator[bytes]:
        """新的一块，还没有文本。"""

    @abstractmethod
    def grew(self, block: Block, text: str) -> Iterator[bytes]:
        """多了 ``text``。"""

    @abstractmethod
    def closed(self, block: Block) -> Iterator[bytes]:
        """这一块完了。"""


def _parts(piece: Piece) -> Iterator[tuple[Kind, CallDelta | None, str]]:
    if piece.reasoning:
        yield "reasoning", None, piece.reasoning
    if piece.text:
        yield "text", None, piece.text
    for delta in piece.calls:
        yield "call", delta, delta.arguments
