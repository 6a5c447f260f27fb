"""specs/runtime 的 RUNTIME-8：后端的名字、类型与库只出现在后端里；导入关系由 import-linter 检查，这里查拼写。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.backend import BACKENDS, backend_named
from deepseek_export.errors import DsxError

pytestmark = pytest.mark.contract

ROOT = Path(deepseek_export.__file__).parent
#: 不在 onnxruntime 上执行、却要写 ONNX 类型的层：算子 schema、捕获、pass 与 dtype 表。
_SCHEMAS = ("dtypes.py", "ops", "capture", "passes")


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_type_strings_are_spelled_only_by_backends():
    """RUNTIME-8：``tensor(float16)`` 这类写法不出现在后端与 schema 之外。"""
    allowed = [ROOT / name for name in ("backend", *_SCHEMAS)]
    found = [
        path
        for path in sources(ROOT)
        if not any(path.is_relative_to(place) for place in allowed)
        and re.search(r"tensor\((u?int|float|bfloat|double|bool)", path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_backends_are_asked_nothing_but_their_limits():
    """RUNTIME-8：``backend/`` 里没有 isinstance 与 type: ignore；别处不对后端、Runner、缓存用 isinstance。"""
    backends = ROOT / "backend"
    for path in sources(ROOT):
        text = path.read_text(encoding="utf-8")
        inside = path.is_relative_to(backends)
        assert not (inside and "type: ignore" in text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                asked = ast.unparse(node.args[1])
                assert not re.search(r"Runner|Backend|Caches|Session", asked), (path, asked)


def test_every_backend_opens_by_its_name():
    """RUNTIME-8：表里的每个名字都有一个后端；没有的按码拒绝，并列出有哪些。"""
    assert [backend_named(name).name for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(DsxError, match="DSX-E613") as caught:
        backend_named("tensorrt")
    assert all(name in caught.value.todo for name in BACKENDS)
