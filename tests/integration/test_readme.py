"""README 里的代码块真的能跑，链接真的存在。"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_export.cli.demo import CHECKPOINT
from tests.integration.cli import dsx

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.en.md")


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """CKPT 是演示检查点的副本（按引用导出要硬链接，得在同一个文件系统上），其余目录由代码块自己产生。"""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(CHECKPOINT, folder / "CKPT")
    return folder


def test_commands_run_in_order(workspace: Path):
    """中文 README 的每条 dsx 命令按次序跑一遍。"""
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    assert len(lines) >= 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "dsx"
        done = dsx(*arguments, cwd=workspace)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def test_python_blocks_run(workspace: Path):
    """Python 代码块各在新进程里跑（在上一个测试导出的 OUT 上）；HF-9 的 pipeline 也在其中。"""
    for block in blocks("README.md", "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=workspace, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_compare_walkthrough_is_true(workspace: Path):
    """docs/compare.md 植入的错真的被找到，节点与原因同文档；用 README 导出的 OUT。"""
    (plant,) = blocks("docs/compare.md", "python")
    subprocess.run([sys.executable, "-c", plant], cwd=workspace, check=True)
    line = blocks("docs/compare.md", "bash")[-1]
    program, *arguments = shlex.split(line)
    assert program == "dsx"
    command = [sys.executable, "-m", "deepseek_export.cli.main", *arguments]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (report,) = (block for block in blocks("docs/compare.md", "text") if "第一个不对的节点" in block)
    shown = [row.strip() for row in report.splitlines() if row.strip().startswith(("块 ", "节点", "原因"))]
    assert len(shown) == 3
    for row in shown:
        assert row in done.stdout


def test_english_readme_has_the_same_code():
    """两份 README 的命令与代码逐字相同。"""
    for language in ("bash", "python", "text"):
        chinese, english = (blocks(name, language) for name in READMES)
        if language == "text":
            chinese, english = chinese[1:], english[1:]  # 第一块是带注释的两条 make 命令
        assert chinese == english


@pytest.mark.parametrize(
    "name",
    [*READMES, "CONTRIBUTING.md", "plugins/README.md"]
    + [str(path.relative_to(ROOT)) for folder in ("docs", "specs") for path in (ROOT / folder).rglob("*.md")],
)
def test_links_exist(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / name).parent.joinpath(target).exists(), target
    assert "@" not in re.sub(r"[\w.]+@[\w.]+", "", text).replace("`@deprecate", ""), "有没填上的占位"
