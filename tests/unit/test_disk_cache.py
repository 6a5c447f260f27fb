"""磁盘缓存：只影响快慢，不影响结果。"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from deepseek_export.capture import blocks
from deepseek_export.capture.trace import Spec, TracedGraph, trace
from deepseek_export.disk_cache import DiskCache
from tests.models import model_config
from tests.odd_files import KINDS, make_odd

pytestmark = pytest.mark.unit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dsx/things"


def test_round_trip(home: Path) -> None:
    cache = DiskCache("things")
    assert cache.get("a") is None
    for content in (b"", b"one\ntwo\n", bytes(range(256))):
        cache.put("a", content)
        assert cache.get("a") == content
    assert os.listdir(home) == ["a"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:-1] + b"X", lambda b: b"", lambda b: b"junk"]
)
def test_damaged_entry_counts_as_absent(home: Path, damage) -> None:
    cache = DiskCache("things")
    cache.put("a", b"content")
    (home / "a").write_bytes(damage((home / "a").read_bytes()))
    assert cache.get("a") is None
    cache.put("a", b"content")
    assert cache.get("a") == b"content"


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_no_file_counts_as_absent(home: Path, kind: str) -> None:
    """目录、管道、设备、断了的链接、大得离谱的：不等、不读，也不影响别的条目。"""
    cache = DiskCache("things", max_entries=2)
    cache.put("a", b"content")
    make_odd(home / "a", kind)
    assert cache.get("a") is None
    for key in ("b", "c", "d"):
        cache.put(key, b"content")
        assert cache.get(key) == b"content"


def test_an_entry_under_another_name_counts_as_absent(home: Path) -> None:
    cache = DiskCache("things")
    cache.put("a", b"content")
    (home / "a").rename(home / "b")
    assert cache.get("b") is None


def test_can_be_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache("things")
    cache.put("a", b"content")
    monkeypatch.setenv("DSX_NO_CACHE", "1")
    assert cache.directory is None
    assert cache.get("a") is None
    cache.put("b", b"content")
    assert os.listdir(home) == ["a"]


def test_unwritable_place_is_not_an_error(home: Path) -> None:
    home.parent.write_text("这里是文件，建不了目录")
    cache = DiskCache("things")
    cache.put("a", b"content")
    assert cache.get("a") is None


def test_least_recently_used_entry_goes_first(home: Path) -> None:
    cache = DiskCache("things", max_entries=2)
    for age, key in enumerate(("old", "older")):
        cache.put(key, b"content")
        os.utime(home / key, (1000 - age, 1000 - age))
    assert cache.get("older") == b"content"
    cache.put("new", b"content")
    assert sorted(os.listdir(home)) == ["new", "older"]


def test_failed_write_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DiskCache("things").put("a", b"content")
    assert os.listdir(home) == []


def test_traced_graph_comes_back_the_same(home: Path) -> None:
    """EXPORT-6：取自缓存的捕获结果与现捕获的逐字节相同，命中时不再捕获。"""
    config = model_config("v3")
    fresh = blocks.head_block.__wrapped__(config, torch.float32)
    again = blocks.head_block.__wrapped__(config, torch.float32)
    assert len(os.listdir(home.parent / "traces")) == 1
    assert again.to_bytes() == fresh.to_bytes()
    assert (again.scopes, again.inputs, again.outputs) == (fresh.scopes, fresh.inputs, fresh.outputs)
    assert TracedGraph.from_bytes(fresh.to_bytes()) == again


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\x04\x0a\x00\x12\x00"], ids=["empty", "junk", "odd"])
def test_a_broken_trace_is_rebuilt_and_said_so(
    home: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """EXPORT-6：摘要对得上、内容却不是那张图的条目：重新捕获并换掉它，不要用户去删。"""
    inputs = {"a": Spec(("B", 3), torch.float32)}

    def add() -> TracedGraph:
        return trace(lambda: lambda a: a + 1, inputs, ["y"], ("add",))

    fresh = add()
    (key,) = os.listdir(home.parent / "traces")
    DiskCache("traces").put(key, content)
    with caplog.at_level("INFO"):
        assert add().to_bytes() == fresh.to_bytes()
    assert "重新捕获" in caplog.text
    assert DiskCache("traces").get(key) == fresh.to_bytes()


def test_key_covers_shapes_types_names_and_attributes(home: Path) -> None:
    class Traced(Exception):
        pass

    def build():
        raise Traced

    def add(inputs: dict[str, Spec], output: str = "y", key: tuple = ("add",)) -> TracedGraph:
        return trace(lambda: lambda a: a + 1, inputs, [output], key)

    first = {"a": Spec(("B", 3), torch.float32)}
    add(first)
    assert trace(build, first, ["y"], ("add",)).outputs == ("y",)
    others = [
        ({"a": Spec(("B", 4), torch.float32)}, "y", ("add",)),
        ({"a": Spec(("B", 3), torch.float16)}, "y", ("add",)),
        ({"b": Spec(("B", 3), torch.float32)}, "y", ("add",)),
        (first, "z", ("add",)),
        (first, "y", ("add", 2)),
    ]
    for inputs, output, key in others:
        with pytest.raises(Traced):
            trace(build, inputs, [output], key)
