"""由检查点导出、留着以后再用的 bundle：别人正在写、刚写完、放不到一起的时候。"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_export.bundle.cached import cached_bundle, cached_path, is_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress

pytestmark = pytest.mark.integration


class Notes(Progress):
    """记下要让用户看到的话。"""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """一行。"""
        self.lines.append(line)


class Writer:
    """照剧本导出：每次先抛这一次的错（``None`` 不抛），不抛或说别人刚写完时那里就有了。"""

    def __init__(self, bundle: Path, *codes: str | None) -> None:
        self.calls: list[bool] = []
        self._bundle, self._codes = bundle, codes

    def __call__(self, out: Path, overwrite: bool) -> None:
        code = self._codes[len(self.calls)]
        self.calls.append(overwrite)
        if code in (None, "DSX-E401"):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(self._bundle, out)
        if code is not None:
            raise DsxError(code, "出了事", "照做")


@pytest.fixture
def cached(tiny: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch) -> Callable[..., tuple[Writer, Notes]]:
    """取一次；给出怎么写的、说了什么。"""
    monkeypatch.setenv("DSX_HOME", str(tmp_path))

    def get(*codes: str | None) -> tuple[Writer, Notes]:
        writer, notes = Writer(tiny_bundle, *codes), Notes()
        out = cached_bundle(tiny, {"profile": "x"}, writer, notes)
        assert out == cached_path(tiny, {"profile": "x"})
        assert (out / "manifest.json").is_file()
        return writer, notes

    return get


def test_written_once_then_used(cached):
    """SERVE-52"""
    assert cached(None)[0].calls == [False]
    assert cached()[0].calls == []


def test_another_writer_is_waited_for(cached):
    """SERVE-52：等着的话只说一遍；它写完了就直接用，刚写完的也是。"""
    writer, notes = cached("DSX-E411", "DSX-E411", "DSX-E401")
    assert writer.calls == [False] * 3
    assert len(notes.lines) == 1
    assert "等它写完" in notes.lines[0]


def test_another_filesystem_says_what_to_set(cached, tmp_path: Path):
    """SERVE-52：按引用要硬链接；别的错原样给出，什么也没有留下。"""
    with pytest.raises(DsxError, match="DSX_HOME") as refused:
        cached("DSX-E407")
    assert refused.value.code == "DSX-E407"
    with pytest.raises(DsxError, match="DSX-E111"):
        cached("DSX-E111")
    assert not list(tmp_path.rglob("manifest.json"))


def test_no_cache_writes_again(cached, monkeypatch):
    """SERVE-52：``DSX_NO_CACHE=1`` 每次都导出，替换那里的。"""
    cached(None)
    monkeypatch.setenv("DSX_NO_CACHE", "1")
    assert cached(None)[0].calls == [True]


def test_what_is_a_checkpoint(tiny: Path, tiny_bundle: Path, tmp_path: Path):
    """SERVE-52：bundle 里也有 config.json，不是检查点；空目录、不存在的都不是。"""
    assert is_checkpoint(tiny)
    assert not is_checkpoint(tiny_bundle)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "none")


def test_the_name_changes_with_what_matters(tiny: Path, tmp_path: Path, monkeypatch):
    """SERVE-52：选项、模板变了是另一份；说明文件、所在的目录变了不是。"""
    monkeypatch.setenv("DSX_HOME", str(tmp_path / "home"))
    copy = tmp_path / "elsewhere" / tiny.name
    shutil.copytree(tiny, copy)
    before = cached_path(tiny, {"target": "portable"})
    assert cached_path(copy, {"target": "portable"}) == before
    (copy / "README.md").write_text("x", encoding="utf-8")
    assert cached_path(copy, {"target": "portable"}) == before
    assert cached_path(copy, {"target": "ort-cpu"}) != before
    (copy / "chat_template.jinja").write_text("x", encoding="utf-8")
    assert cached_path(copy, {"target": "portable"}) != before


def test_files_too_large_to_be_text_are_named(tiny: Path, tmp_path: Path, monkeypatch):
    """SERVE-52：按码拒绝，没有 traceback。"""
    monkeypatch.setenv("DSX_HOME", str(tmp_path / "home"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    with (copy / "vocab.json").open("wb") as file:
        file.truncate(300 << 20)  # 稀疏的，不占空间
    with pytest.raises(DsxError, match="DSX-E101"):
        cached_path(copy, {})
