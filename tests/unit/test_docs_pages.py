"""由别处写出来的页是最新的：命令行的参考取自 click，性能与 README 的数字取自历史。"""

from __future__ import annotations

import re

import pytest

import deepseek_export
from deepseek_export.cli.main import COMMANDS
from perf import pages, results
from tools import make_cli_page, make_engine_steps

pytestmark = pytest.mark.unit


def test_the_cli_page_is_generated():
    """不一致就运行 ``python -m tools.make_cli_page``。"""
    text = make_cli_page.page()
    assert make_cli_page.PAGE.read_text(encoding="utf-8") == text
    assert re.findall(r"^## dsx (\w+)$", text, re.MULTILINE) == list(COMMANDS)
    assert "`-P, --prompt TEXT`" in text


def test_the_page_counts_the_engine_listings():
    """KERNEL-12：docs/gpu.md 里解码一步的层数与启动次数就是清单与启动表数出的；不一致就运行 ``python -m tools.make_engine_steps``。"""
    page = make_engine_steps.PAGE.read_text(encoding="utf-8")
    section = page.partition(make_engine_steps.BEGIN)[2].partition(make_engine_steps.END)[0]
    assert section.strip() == make_engine_steps.section().strip()


def test_the_api_page_names_everything_public():
    """顶层的每个名字在 docs/api.md 里各有一项。"""
    text = (make_cli_page.PAGE.parent / "api.md").read_text(encoding="utf-8")
    assert {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)} == set(
        deepseek_export.__all__
    )


def test_performance_and_the_readme_figures_come_from_the_history():
    """REPORT-6：页、图与数都是历史写出来的，没有多余的图；不一致就运行 ``python -m perf pages``。"""
    written = pages.texts(results.load())
    pictures = set(pages.PICTURES.glob("*.svg"))
    assert pictures
    fixed = {pages.PAGE, pages.LARGE, pages.VALIDATION_FILE, *pages.READMES.values()}
    assert set(written) == fixed | pictures
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, path


def test_a_newer_full_run_changes_the_figures_and_a_quick_one_does_not():
    """README 的数字是最近一次完整的运行的。"""
    runs = results.load()
    line = pages.HEADLINES[0]
    last = next(run for run in results.newest(runs) if run.suites[0].suite == line.suite)
    halved = [
        case.model_copy(update={"ratios": {name: value.scaled(0.5) for name, value in case.ratios.items()}})
        for case in last.suites[0].cases
    ]
    suite = last.suites[0].model_copy(update={"cases": halved})
    newer = last.model_copy(update={"started": "2999-01-01T00:00:00+00:00", "suites": [suite]})
    before = pages.headline_table(results.newest(runs), "zh")
    assert pages.headline_table(results.newest([newer, *runs]), "zh") != before
    quick = newer.model_copy(update={"quick": True})
    assert pages.headline_table(results.newest([*runs, quick]), "zh") == before
