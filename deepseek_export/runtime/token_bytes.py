"""一个 token 是哪几个字节：字符可以从一个 token 的中间断开，所以不能只看文本。"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class TokenBytes:
    """``bytes_of(id)``：这个 token 的字节，依次接起来就是解码出来的文本的 UTF-8（特殊 token 除外，它们不算文本）。

    认得 byte-level 的词表（DeepSeek、GLM、Kimi 都是）与 SentencePiece 式的（``▁`` 是空格，``<0xE6>`` 是字节）。

    Args:
        tokenizer: Hugging Face tokenizers 的对象。
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> bytes:
        """词表里没有的 id 是空的。"""
        added = self._added.get(token)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_BYTES[char] for char in piece if char in _BYTES)
        if (fallback := _BYTE_FALLBACK.fullmatch(piece)) is not None:
            return bytes([int(fallback[1], 16)])
        return piece.replace(_METASPACE, " ").encode()

    @cached_property
    def _added(self) -> Mapping[int, str]:
        """不经过词表编码的 token：id → 原文。"""
        return {token: added.content for token, added in self._tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._tokenizer.decoder
        return decoder is not None and "ByteLevel" in _kinds(json.loads(decoder.__getstate__()))


def _kinds(decoder: Mapping[str, Any]) -> Iterator[str]:
    """一个解码器与它里面的各个解码器的种类。"""
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _kinds(inner)


def _byte_alphabet() -> dict[str, int]:
    """byte-level BPE 用哪个字符写哪个字节（GPT-2 的约定）：看得见的写它自己，其余从 U+0100 起依次写。"""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
