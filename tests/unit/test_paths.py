"""用户给的路径：是什么，看不了的按码拒绝。"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind
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
