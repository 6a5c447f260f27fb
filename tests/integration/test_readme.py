"""README 与 docs/ 里的代码块真的能跑，两份 README 说的是同样的事，链接真的存在。"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from deepseek_export.cli.demo import CHECKPOINT
from tests.integration.cli import dsx

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.en.md")
#: bash 代码块是从头到尾能跑的 dsx 命令的页；上手那一页导出的 OUT 别的页也用。
PAGES = (
    "docs/getting-started.md",
    "docs/large-models.md",
    "docs/quantisation.md",
    "docs/speculation.md",
    "docs/engines.md",
    "docs/scale.md",
)


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    return [line for block in blocks(name, "bash") for line in block.splitlines()]


def run_page(name: str, folder: Path) -> None:
    """页里的 dsx 命令按次序跑一遍。"""
    for line in commands(name):
        program, *arguments = shlex.split(line)
        assert program == "dsx"
        done = dsx(*arguments, cwd=folder)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """CKPT 是演示检查点的副本（按引用导出要硬链接，得在同一个文件系统上），TEXT 是一段文本，OUT 由“上手”的命令产生。"""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(CHECKPOINT, folder / "CKPT")
    shutil.copyfile(ROOT / "README.md", folder / "TEXT")
    run_page(PAGES[0], folder)
    return folder


@pytest.mark.parametrize("page", PAGES[1:])
def test_commands_run_in_order(workspace: Path, page: str):
    """每页的 dsx 命令都成功；“上手”的在 workspace 里跑过。"""
    assert commands(page)
    run_page(page, workspace)


def test_readme_commands_are_those_of_getting_started():
    """README 的命令“上手”里都有，次序相同，所以也跑过。"""
    rest = iter(commands(PAGES[0]))
    assert len(commands("README.md")) >= 3
    assert all(line in rest for line in commands("README.md"))


@pytest.mark.parametrize("page", ["README.md", PAGES[0]])
def test_python_blocks_run(workspace: Path, page: str):
    """Python 代码块各在新进程里跑；HF-9 的 pipeline 也在其中。"""
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=workspace, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_every_page_with_commands_is_run():
    """没有哪一页的 bash 代码块漏在外面；compare 的在下面跑，serve 的在 test_serve.py。"""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if commands(str(path))}
    assert found == {*PAGES, "docs/compare.md", "docs/serve.md"}


def test_the_compare_walkthrough_is_true(workspace: Path):
    """docs/compare.md 植入的错真的被找到，节点与原因同文档；用“上手”导出的 OUT。"""
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


def test_both_readmes_say_the_same():
    """命令与代码逐字相同；逐节的数字、代码里的名字、链接与图也相同；都在 100 行之内。"""
    for language in ("bash", "python", "text"):
        chinese, english = (blocks(name, language) for name in READMES)
        if language == "text":
            chinese, english = chinese[1:], english[1:]  # 第一块是带注释的两条 make 命令
        assert chinese == english
    sections = [(ROOT / name).read_text(encoding="utf-8").split("\n## ") for name in READMES]
    assert len(sections[0]) == len(sections[1])
    for chinese, english in zip(*sections, strict=True):
        assert facts(chinese) == facts(english)
    for name in READMES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 100


def facts(text: str) -> Counter[str]:
    """一节里不随语言变的：数（“亿”写成 B 的除外）、反引号里的名字、链接的去处。"""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if target not in READMES]
    words = re.sub(r"\]\([^)]+\)", "]", prose)
    codes = re.findall(r"`([^`]+)`", words)
    numbers = re.findall(r"\d[\d.,]*\d|\d", re.sub(r"`[^`]+`|[\d.]+ (?:亿|B\b)", "", words))
    return Counter([*targets, *codes, *numbers])


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
    if name != "docs/cli.md":  # 取自命令自己的帮助，那里 @FILE 不加反引号
        prose = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)
        assert "@" not in re.sub(r"[\w.]+@[\w.]+", "", prose), "有没填上的占位"
