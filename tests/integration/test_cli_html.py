"""``--html``：五个命令各写一页，页里的数与同一次的 JSON 相同；写不下的不丢结果。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepseek_export.bundle import Bundle
from tests.bundles import edit_weight, tampered
from tests.integration.cli import assert_refused, dsx, dsx_limited, last_json
from tests.report_pages import SVG, check_picture, holds, parsed, rows

pytestmark = pytest.mark.integration

SMALL = ("--prompt-len", "4", "--new-tokens", "2", "--depth", "16", "--depth", "32", "--runs", "2")
COMMANDS = {
    "verify": ("--level", "block"),
    "compare": (),
    "bench": SMALL,
    "plan": ("--gpu", "h100,rtx4090"),
    "inspect": (),
}


def _wanted(command: str, bundle: Path, found: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """JSON 里的每一行：行名与数。"""
    if command == "verify":
        cases = json.loads((bundle / "reports/parity.json").read_text())["cases"]
        return [(case["name"], [case["measure"]["max_abs"], case["measure"]["got"]]) for case in cases]
    if command == "compare":
        cases = json.loads((bundle / "reports/compare/compare.json").read_text())["cases"]
        return [(one["case"]["name"], [one["case"]["measure"]["calc_diff"]]) for one in cases]
    if command == "bench":
        return [(f"{one['context']}，被测", [one["step_s"]["bundle"]["median"]]) for one in found["depths"]]
    if command == "plan":
        return [(gpu["title"], [one["weight_bytes"]]) for gpu in found["gpus"] for one in gpu["requested"]]
    return [(f"{one['graph']} {one['block']}", list(one["weights"].values())) for one in found["blocks"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_writes_one_page(
    command: str, tiny: Path, tiny_bundle: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    """REPORT-1、REPORT-2：真的 bundle；JSON 仍是 stdout 的最后一行。"""
    subject = {"plan": tiny, "inspect": demo_bundle}.get(command, tiny_bundle)
    page = tmp_path / "page.html"
    process = dsx(command, subject, *COMMANDS[command], "--html", page, "--json")
    assert process.returncode == 0, process.stderr
    wanted = _wanted(command, subject, last_json(process))
    assert wanted
    text = page.read_text(encoding="utf-8")
    found = rows(text)
    for name, numbers in wanted:
        assert holds(found, name, numbers), name
    pictures = list(parsed(text).iter(f"{SVG}svg"))
    assert pictures
    for picture in pictures:
        check_picture(picture)
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    again = dsx(command, subject, *COMMANDS[command], "--html", page)
    assert again.stdout.splitlines()[-1] == f"网页    {page}"


def test_a_failed_comparison_is_in_the_page(tiny_bundle: Path, tmp_path: Path) -> None:
    """REPORT-2：不过也写，退出码仍是 1；页里有坐标，``--bisect`` 的节点与原因。"""
    good, name = Bundle.open(tiny_bundle), "model.layers.1.self_attn.o_proj.weight"
    bad = tampered(good, tmp_path, edit_weight(good, name, lambda array: array * 1.5))
    page = tmp_path / "page.html"
    process = dsx("compare", bad.path, "--bisect", "--html", page, "--json")
    assert process.returncode == 1, process.stderr
    culprit = last_json(process)["culprit"]
    text = "".join(parsed(page.read_text(encoding="utf-8")).itertext())
    assert "✗ 不一致" in text
    assert "第一个不对的块" in text
    assert culprit["value"] in text
    assert all(cause in text for cause in culprit["causes"])
    assert all(node["name"] in text for node in culprit["nodes"])


def test_what_may_not_be_written_is_said_before_the_work(
    tiny: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """REPORT-3：什么也没有算就拒绝。"""
    mine = tmp_path / "mine.txt"
    mine.write_text("别人的")
    for path, code in ((mine, "DSX-E401"), (tmp_path, "DSX-E401"), (tmp_path / "no/a.html", "DSX-E405")):
        for command in COMMANDS:
            process = dsx(command, tiny if command == "plan" else tiny_bundle, "--html", path)
            assert_refused(process, code)
            assert process.stdout == ""
    assert mine.read_text() == "别人的"


@pytest.mark.parametrize("command", ["verify", "bench", "plan", "inspect"])
def test_a_full_disk_loses_nothing(command: str, tiny: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """REPORT-3：先印结果；写满了按码失败，没有半个文件，上一次的还在。"""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    page = tmp_path / "page.html"
    subject = tiny if command == "plan" else bundle
    options = ("--level", "model") if command == "verify" else COMMANDS[command]

    def run(*extra: object) -> Any:
        line = (command, subject, *options, "--html", page, *extra)
        return dsx_limited(256, *line, DSX_NO_CACHE="1")

    process = run()
    assert_refused(process, "DSX-E404")
    shown = {"verify": "结论    全部通过", "bench": "token/s", "plan": "KV 缓存", "inspect": "KV 缓存"}[
        command
    ]
    assert shown in process.stdout
    assert "网页" not in process.stdout
    assert not page.exists()
    done = dsx(command, subject, *options, "--html", page)
    assert done.returncode == 0, done.stderr
    before = page.read_bytes()
    process = run("--json")
    assert_refused(process, "DSX-E404")
    *_, result, error = process.stdout.splitlines()
    assert json.loads(result)
    assert json.loads(error)["error"]["code"] == "DSX-E404"
    assert page.read_bytes() == before
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_the_page_is_written_where_the_report_is_not(tiny_bundle: Path, tmp_path: Path) -> None:
    """REPORT-3：bundle 写不了，页在别处：照写，退出码仍说报告没有写成。"""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.rmtree(bundle / "reports")
    (bundle / "reports").touch()
    page = tmp_path / "page.html"
    process = dsx("bench", bundle, *SMALL, "--html", page)
    assert_refused(process, "DSX-E405")
    assert "reports" in process.stderr
    assert "解码一步的时间与上下文" in page.read_text(encoding="utf-8")
