"""docs/ 里教程的代码块按次序在一个进程里跑一遍，A/B 数字由代码块自己打印（HF-13）。"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_export.cli.demo import CHECKPOINT

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/guide-transformers.md"


def test_every_block_of_the_guide_runs(tmp_path: Path):
    """HF-13：代码块里的断言都成立，每一步都打印了数字。"""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```") / 2 == 8
    (tmp_path / "CKPT").symlink_to(CHECKPOINT)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for label in ("原样：", "moe：", "mla+moe：", "full：", "bundle："):
        assert re.search(rf"^{re.escape(label)}.*\d", done.stdout, re.MULTILINE), done.stdout


def test_the_guide_links_exist():
    """HF-13"""
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8")):
        assert (GUIDE.parent / target).exists(), target
