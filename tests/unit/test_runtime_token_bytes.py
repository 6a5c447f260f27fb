"""一个 token 是哪几个字节：依次接起来就是文本的 UTF-8。"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from deepseek_export.runtime.token_bytes import TokenBytes
from tests.unit.test_runtime_tokenizer import BOS, byte_tokenizer

pytestmark = pytest.mark.unit

BYTE_LEVEL = byte_tokenizer()


@given(st.text(max_size=30))
def test_byte_level_tokens_add_up_to_the_text(text: str) -> None:
    """SERVE-29：什么文本都成，控制字符、半个字也不例外。"""
    bytes_of = TokenBytes(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert b"".join(map(bytes_of, ids)) == text.encode()


def test_added_and_unknown_tokens() -> None:
    bytes_of = TokenBytes(BYTE_LEVEL)
    bos = BYTE_LEVEL.token_to_id(BOS)
    assert bytes_of(bos) == BOS.encode()
    assert bytes_of(10**6) == b""


def test_sentencepiece_tokens() -> None:
    """``▁`` 是空格，``<0xE6>`` 是一个字节；解码器可以套在一串里，也可以没有。"""
    vocab = {"▁a": 0, "<0xE6>": 1, "月": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    assert [TokenBytes(tokenizer)(token) for token in range(3)] == [b" a", b"\xe6", "月".encode()]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert [TokenBytes(tokenizer)(token) for token in range(3)] == [b" a", b"\xe6", "月".encode()]
    nested = Tokenizer(models.BPE(vocab={"Ġa": 0}, merges=[]))
    nested.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    assert TokenBytes(nested)(0) == b" a"
