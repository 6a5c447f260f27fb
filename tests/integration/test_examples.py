"""``examples/`` 里的每一个都真的跑，结果与 dsx 自己的相同。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import deepseek_export
from tests.integration.cli import environment

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_plain_onnxruntime_decodes_without_a_warning(demo_bundle):
    """逐 token 与 dsx 相同；缓存原地更新，一条 TensorScatter 的警告也没有；不导入 dsx。"""
    source = EXAMPLES / "onnxruntime_decode.py"
    assert "deepseek_export" not in source.read_text(encoding="utf-8")
    command = [sys.executable, str(source), str(demo_bundle), "床前明月光", "--tokens", "24"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert process.returncode == 0, process.stderr
    assert "TensorScatter" not in process.stderr
    assert process.stdout == deepseek_export.load(demo_bundle).generate("床前明月光", 24).text[0] + "\n"
