"""用户给的路径：是什么，看不了的按码拒绝。"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek_export.errors import DsxError
from deepseek_export.paths import check_readable, optional_file, path_kind, read_text
from tests.odd_files import KINDS, make_odd
from tests.permissions import permissions_apply

pytestmark = pytest.mark.unit


def refused(path: Path) -> DsxError:
    with pytest.raises(DsxError) as error:
        path_kind(path, "DSX-E402")
    assert error.value.code == "DSX-E402"
    return error.value


def test_kinds(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    kinds = {"": "directory", "file": "file", "link": "directory", "dangling": "missing", "none/x": "missing"}
    for name, kind in kinds.items():
        assert path_kind(tmp_path / name, "DSX-E402") == kind
    assert path_kind(Path("/dev/null"), "DSX-E402") == "other"


def test_what_cannot_be_looked_at_is_refused_with_the_reason(tmp_path: Path):
    """上级是文件、名字太长、链接成环、没有权限。"""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert "Not a directory" in refused(tmp_path / "file/x").what
    assert "too long" in refused(tmp_path / ("x" * 256)).what
    assert "symbolic links" in refused(tmp_path / "loop").what
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with permissions_apply():
        error = refused(closed / "x")
    assert "Permission denied" in error.what
    assert "权限" in error.todo


@pytest.mark.parametrize("name", [os.fsdecode(b"n\xff8"), "\ud800", "a\0b"])
def test_names_that_are_not_utf8_are_refused(name: str, tmp_path: Path):
    error = refused(tmp_path / name)
    assert "UTF-8" in error.what
    str(error).encode()  # 印得出来


def test_a_relative_path_in_a_folder_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """输出要换成绝对路径才写，所以看的是绝对路径。"""
    folder = tmp_path / os.fsdecode(b"n\xff8")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "UTF-8" in refused(Path("out")).what


@pytest.mark.parametrize("kind", KINDS)
def test_only_small_regular_files_are_read(tmp_path: Path, kind: str):
    """EXPORT-26：不等在管道上，不读没有尽头的、大得离谱的；说出原因。"""
    path = tmp_path / "odd"
    make_odd(path, kind)
    with pytest.raises(OSError, match=r"不是普通文件|至多|No such file"):
        read_text(path)
    if kind != "huge":
        with pytest.raises(DsxError, match="DSX-E402"):
            check_readable(path, "DSX-E402", "换一个")
        with pytest.raises(DsxError, match="DSX-E501") as error:
            optional_file(path, "DSX-E501")
        assert "不是普通文件" in error.value.what


def test_text_is_utf8_and_within_its_limit(tmp_path: Path):
    path = tmp_path / "text"
    assert not optional_file(path, "DSX-E501")
    path.write_text("床前明月光", encoding="utf-8")
    assert optional_file(path, "DSX-E501")
    assert read_text(path, 15) == "床前明月光"
    with pytest.raises(OSError, match="15 字节，这种文件至多 14"):
        read_text(path, 14)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
