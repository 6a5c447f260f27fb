"""HTTP 那一层的小件：密钥、请求体的上限、思考与答案分开。"""

from __future__ import annotations

import asyncio
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_export.errors import DsxError
from deepseek_export.serving.http.guards import LimitBody
from deepseek_export.serving.http.keys import VARIABLE, KeyRing, read_keys
from deepseek_export.serving.http.reasoning import Parts, ReasoningSplit, begins_thinking

pytestmark = pytest.mark.unit


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def test_no_keys_admit_everyone():
    assert not read_keys(None, {})
    assert KeyRing().admits(None)


def test_keys_of_the_file_and_of_the_environment_add_up(tmp_path: Path):
    """SERVE-26"""
    file = tmp_path / "keys"
    file.write_text("# 甲的\none\n\n  two  \n", encoding="utf-8")
    keys = read_keys(file, {VARIABLE: "three, four"})
    assert all(keys.admits(bearer(key)) for key in ("one", "two", "three", "four"))
    assert keys.admits(b"bearer  one")
    refused = (
        None,
        b"",
        b"one",
        b"Bearer",
        bearer("five"),
        bearer("one two"),
        b"Basic one",
        bearer("# 甲的"),
    )
    assert not any(keys.admits(value) for value in refused)
    assert not any(key in str(vars(keys)) for key in ("one", "two", "three", "four"))


@pytest.mark.parametrize("text", ["", "\n# 只有注释\n", "two words\n", "密钥\n", "a\x7f\n", b"\xff"])
def test_files_without_usable_keys(tmp_path: Path, text: str | bytes):
    """SERVE-26：给了文件而没有密钥，不当作谁都放行；报错里没有密钥。"""
    file = tmp_path / "keys"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DsxError, match="DSX-E730") as refused:
        read_keys(file, {})
    assert "two words" not in str(refused.value)


def test_other_bad_sources(tmp_path: Path):
    """SERVE-26"""
    for file, environ in ((tmp_path / "none", {}), (tmp_path, {}), (None, {VARIABLE: " , "})):
        with pytest.raises(DsxError, match="DSX-E730"):
            read_keys(file, environ)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DsxError, match="DSX-E730"):
        read_keys(tmp_path / "pipe", {})


class Exchange:
    """一次 ASGI 往来：``parts`` 依次到，之后一直不来。"""

    def __init__(self, parts: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
        self.scope = {"type": "http", "headers": headers}
        self._parts = parts
        self.sent: list[dict] = []
        self.body: bytes | None = None

    async def receive(self) -> dict:
        if not self._parts:
            await asyncio.sleep(3600)
        part = self._parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": part != b"end"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    async def app(self, scope, receive, send) -> None:
        self.body = (await receive())["body"]

    def run(self, **limits: float) -> int | None:
        """拒绝的状态码；放行为 ``None``。"""
        layer = LimitBody(self.app, **limits)  # type: ignore[arg-type]
        asyncio.run(layer(self.scope, self.receive, self.send))
        if not self.sent:
            return None
        assert set(json.loads(self.sent[1]["body"])["error"]) == {"message", "type", "param", "code"}
        return self.sent[0]["status"]


def test_bodies_within_the_limit_pass_whole():
    """SERVE-26"""
    exchange = Exchange([b"1234", b"", b"end"], [])
    assert exchange.run(limit=7) is None
    assert exchange.body == b"1234end"


def test_bodies_too_large_or_too_slow():
    """SERVE-26：声明得太大的一个字节也不收，没有声明的收到超出为止；太慢的不等。"""
    declared = Exchange([], [(b"content-length", b"8")])
    assert declared.run(limit=7) == 413
    chunked = Exchange([b"1234", b"5678", b"end"], [])
    assert chunked.run(limit=7) == 413
    slow = Exchange([b"1234"], [])
    assert slow.run(limit=7, seconds=0.01) == 408
    assert (declared.body, chunked.body, slow.body) == (None, None, None)


def split(pieces: list[str], begun: bool) -> Parts:
    one = ReasoningSplit(begun)
    parts = [one.feed(piece) for piece in pieces] + [one.flush()]
    return Parts(*("".join(texts) for texts in zip(*parts, strict=True)))


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        ("想\n</think>\n\n答", True, "想\n", "答"),
        ("<think>\n想</think>答</think>", True, "想", "答</think>"),
        ("<think>想</think>答", False, "想", "答"),
        ("\n<think>\n\n想</think>\n答\n", False, "想", "答\n"),
        ("答 <think> 不是思考 </think>", False, "", "答 <think> 不是思考 </think>"),
        ("</think>答", True, "", "答"),
        ("</think>答", False, "", "</think>答"),
        ("没有想完 </thi", True, "没有想完 </thi", ""),
        ("<thin", False, "", "<thin"),
        ("<thin", True, "<thin", ""),
        (" \n", False, "", " \n"),
        ("", True, "", ""),
        ("a < b 而且 </think", True, "a < b 而且 </think", ""),
    ],
)
def test_reasoning_and_content(text: str, begun: bool, reasoning: str, content: str):
    """SERVE-28：整段给、一个字一个字给，结果一样。"""
    assert split([text], begun) == split(list(text), begun) == Parts(reasoning, content)


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", "字", " "]), max_size=8
    ),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    begun=st.booleans(),
)
def test_cutting_never_changes_the_split(pieces: list[str], cuts: list[int], begun: bool):
    """SERVE-28"""
    text = "".join(pieces)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    cut = [text[a:b] for a, b in pairwise(edges)]
    assert split(cut, begun) == split([text], begun)


def test_templates_that_begin_the_thinking():
    """SERVE-28"""
    assert begins_thinking("<｜Assistant｜><think>\n")
    assert not begins_thinking("<｜Assistant｜></think>")
