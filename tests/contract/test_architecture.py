"""docs/architecture.md 与代码一致：提到的文件都在，两条路不回头，图是最新的。"""

from __future__ import annotations

import re

import pytest

from tools.draw_rooms import GROUPS, PICTURE, ROOT, draw, rooms

pytestmark = pytest.mark.contract

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\d+\. `([^`]+)`", re.MULTILINE)


def test_named_files_exist():
    """EXPORT-35：页里写出的每个路径都存在。"""
    named = {path for path in re.findall(r"`([\w./]+\.(?:py|cc|h|toml))`", PAGE) if "/" in path}
    assert len(named) > 30
    missing = [p for p in named if not any((ROOT / place / p).is_file() for place in ("", "deepseek_export"))]
    assert missing == []


def test_walks_never_come_back():
    """EXPORT-35：每条路上没有一个文件出现两次。"""
    walks = [STEP.findall(part) for part in re.split(r"^## |^换成", PAGE, flags=re.MULTILINE)]
    walks = [walk for walk in walks if walk]
    assert [len(walk) for walk in walks] == [13, 6, 15]
    generate, tensorrt, plugin = walks
    for walk in (generate, generate[:7] + tensorrt, plugin):
        assert len(walk) == len(set(walk))


def test_picture_is_drawn_from_the_layers():
    """EXPORT-35：图与 import-linter 的层、各房间的说明一致；不一致就运行 ``python -m tools.draw_rooms``。"""
    found = rooms()
    assert {name for _, names in GROUPS.values() for name in names} <= {room.name for room in found}
    assert all(room.purpose for room in found)
    assert PICTURE.read_text(encoding="utf-8") == draw(found)
