"""specs/report：网页报告自包含、数与 JSON 相同、先印后写、谁都看得见。"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_export.benchmark.spread import Spread
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.errors import DsxError
from deepseek_export.inspection import polygraphy_trials, summarize
from deepseek_export.plan import make_plan
from deepseek_export.plan.result import Plan
from deepseek_export.profile import resolve_profile
from deepseek_export.report.bars import Bar, Group, bar_chart
from deepseek_export.report.bench import bench_page
from deepseek_export.report.inspect import inspect_page
from deepseek_export.report.page import Number, Page, Section, Table, render
from deepseek_export.report.parity import compare_page, verify_page
from deepseek_export.report.plan import plan_page
from deepseek_export.report.svg import clean
from deepseek_export.report.write import check_target, write_page
from tests import report_pages
from tests.report_pages import HOSTILE, SVG, check_picture, holds, parsed, rows

pytestmark = pytest.mark.contract


def plan() -> Plan:
    """放得下的、放不下的、没有切法的 GPU 都有。"""
    found = make_plan(
        CHECKPOINT, resolve_profile("mla+moe"), gpus=["h100", "rtx4090", "l4"], count=2, batch=8
    )
    odd = make_plan(CHECKPOINT, resolve_profile("mla+moe"), gpus=["h100"], count=7).gpus[0]
    small = found.gpus[1].model_copy(
        update={
            "usable_bytes": 4_000_000,
            "requested": [
                one.model_copy(update={"fits": False, "decode_tokens_per_second": None, "decode_bound": None})
                for one in found.gpus[1].requested
            ],
        }
    )
    return found.model_copy(update={"gpus": [found.gpus[0], small, odd], "checkpoint": HOSTILE})


@pytest.fixture(scope="module")
def summary(v3_bundle: Any) -> dict[str, Any]:
    return summarize(v3_bundle.manifest) | {
        "polygraphy": polygraphy_trials(v3_bundle.path, v3_bundle.manifest)
    }


@pytest.fixture(scope="module")
def pages(summary: dict[str, Any]) -> dict[str, str]:
    made: dict[str, Page] = {
        "verify": verify_page(report_pages.parity_report()),
        "verify, 61 layers": verify_page(report_pages.parity_report(61)),
        "compare": compare_page(report_pages.comparison_report()),
        "bench": bench_page(report_pages.bench_report()),
        "bench alone": bench_page(report_pages.bench_report(against=False, memory=False)),
        "plan": plan_page(plan()),
        "inspect": inspect_page(HOSTILE, summary),
    }
    return {name: render(page) for name, page in made.items()}


def test_pages_take_nothing_from_outside(pages: dict[str, str]) -> None:
    """REPORT-1：没有脚本、外面的资源与网址；写着什么都不成为标签。"""
    for name, page in pages.items():
        root = parsed(page)
        assert {"script", "link", "img", "iframe", "object", "image", "use", "a"}.isdisjoint(
            node.tag.removeprefix(SVG) for node in root.iter()
        ), name
        for node in root.iter():
            assert {"src", "href", "style", "srcset"}.isdisjoint(node.attrib), name
            assert not any(key.startswith("on") for key in node.attrib), name
        style = "".join(root.find("head/style").itertext())  # type: ignore[union-attr]
        assert not re.search(r"url\(|@import|@font-face", style)
        policy = root.find("head/meta[@http-equiv='Content-Security-Policy']")
        assert policy is not None
        assert policy.get("content") == "default-src 'none'; style-src 'unsafe-inline'"
        # 用户的字里可以有网址，但只是文字。
        without = page.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
            html.escape(HOSTILE[3:40]), ""
        )
        assert "http" not in re.sub(r"http-equiv|http://x\.test/y\.js", "", without), name
    shown = "".join(parsed(pages["verify"]).itertext())
    assert clean(HOSTILE) in shown


def test_verify_page_has_every_case(pages: dict[str, str]) -> None:
    """REPORT-2：每一项一行，三个量、各自的限、坐标那里的两个值都与报告相同。"""
    for name, layers in (("verify", 3), ("verify, 61 layers", 61)):
        report, found = report_pages.parity_report(layers), rows(pages[name])
        for case in report.cases:
            numbers: list[float] = [case.near_ties]
            words = [clean(case.note)] if case.note else []
            if (m := case.measure) is not None and (limit := case.tolerance) is not None:
                numbers += [m.max_abs, m.calc_diff, abs(m.norm_ratio - 1), m.got, m.want, m.count]
                numbers += [limit.limit(m.scale), limit.calc_diff, limit.norm]
                words.append("[0, 3, 7]")
            words.append("✓ 通过" if case.passed else "✗ 不过")
            assert holds(found, clean(case.name), numbers, tuple(words)), case
    text = "".join(parsed(pages["verify"]).itertext())
    assert "不通过" in text
    assert "head (prefill)" in text.partition("第一处不通过")[2][:200]
    assert "0.01" in text.partition("量化的损失")[2] or "1.00e-02" in text


def test_compare_page_has_every_block(pages: dict[str, str]) -> None:
    """REPORT-2：每个后端、图、块、阶段一行。"""
    report, found = report_pages.comparison_report(), rows(pages["compare"])
    for row in report.cases:
        m = row.case.measure
        assert m is not None
        assert holds(found, clean(row.case.name), [m.max_abs, m.calc_diff], (clean(row.block), row.phase))
    counts = [row for row in found if row.name == "layers.0.self_attn (prefill)"]
    assert len(counts) == 4  # 两张图、两个后端
    titles = ["".join(node.itertext()) for node in parsed(pages["compare"]).iter("h2")]
    assert {"model.onnx，ort 对 PyTorch", "mtp.onnx，trt 对 PyTorch"} <= set(titles)


def test_bench_page_has_every_measurement(pages: dict[str, str]) -> None:
    """REPORT-2：每个上下文、跑法、内存、比值都在。"""
    report, found = report_pages.bench_report(), rows(pages["bench"])
    for depth in report.depths:
        for name, shown in (("bundle", "被测"), ("against", "对照")):
            step = depth.step_s[name]
            assert holds(found, f"{depth.context}，{shown}", [step.median, step.low, step.high])
            read, machine = depth.reads[name], depth.machine_bytes_per_second
            numbers = [read.weight_bytes, read.cache_bytes, read.bytes_per_second.median, read.share.median]
            assert holds(found, f"{depth.context}，{shown}", [*numbers, machine.median])
    for name, way in report.ways.items():
        title = name.replace("bundle", "被测").replace("against", "对照").replace("/plain", " 逐个 token")
        numbers = [
            one for spread in (way.prefill_s, way.token_s) for one in (spread.median, spread.low, spread.high)
        ]
        assert holds(found, title.replace("/speculative", " 投机"), [*numbers, 1 / way.token_s.median])
    assert any("90.0%、没有轮到" in row.words for row in found)
    for ratio in report.ratios:
        value = ratio.value
        assert any({value.median, value.low, value.high} <= set(row.numbers) for row in found)
    sample = report.subjects["bundle"].memory
    assert sample is not None
    assert holds(found, "被测", [*sample.model_dump().values(), 576])


def test_plan_page_has_every_split(pages: dict[str, str]) -> None:
    """REPORT-2：每种 GPU 的每种切法，各种权重与缓存。"""
    wanted, found = plan(), rows(pages["plan"])
    for gpu in wanted.gpus:
        for split in gpu.requested:
            numbers = [split.gpus, split.weight_bytes, split.cache_bytes, gpu.usable_bytes]
            if split.decode_tokens_per_second is not None:
                numbers.append(split.decode_tokens_per_second)
            assert holds(found, gpu.title, numbers, ("✓ 放得下" if split.fits else "✗ 放不下",))
        assert holds(
            found, gpu.title, [] if gpu.smallest is None else [gpu.smallest.gpus], (gpu.no_split or "",)
        )
    for kind, value in wanted.weight_bytes.items():
        assert holds(found, kind, [value])
    for entry in wanted.stored:
        assert holds(found, entry.dtype, [entry.tensors, entry.bytes])
    for one in wanted.export:
        assert holds(found, f"导出 {one.mode} {one.dtype}", [one.disk_bytes, one.peak_ram_bytes])
    assert holds(found, "潜向量", [wanted.cache.latent_bytes_per_token, wanted.cache.latent_bytes])
    assert all(line in pages["plan"] for line in wanted.assumptions)


def test_inspect_page_has_every_block(pages: dict[str, str], summary: dict[str, Any], v3_bundle: Any) -> None:
    """REPORT-2：每个算子、每层、每个缓存张量、每个输入输出；各块的权重加起来就是全部。"""
    found = rows(pages["inspect"])
    layers = [block for block in summary["blocks"] if block["layer"] is not None]
    assert [block["layer"] for block in layers] == [
        layer for g in v3_bundle.manifest.graphs for layer in g.layers
    ]
    assert sum(sum(block["weights"].values()) for block in summary["blocks"]) == summary["weights"]["bytes"]
    for block in summary["blocks"]:
        weights = list(block["weights"].values())
        assert holds(found, f"{block['graph']} {block['block']}", [*weights, sum(weights)])
    for graph in summary["graphs"]:
        assert all(holds(found, op, [count]) for op, count in graph["op_counts"].items())
        for value in [*graph["inputs"], *graph["outputs"]]:
            assert holds(found, value["name"], [], (value["dtype"],))
    for tensor in summary["cache"]["tensors"]:
        assert holds(found, tensor["name"], [tensor["heads"], tensor["width"]])
    for one in summary["passes"]:
        assert holds(found, one["name"], [one["count"], len(one["refused"])])


def test_inspect_shows_whatever_the_cache_table_holds(summary: dict[str, Any]) -> None:
    """REPORT-2：缓存有几种、每种有什么字段由 manifest 说了算。"""
    more = [*summary["cache"]["tensors"], {"name": "index_cache", "heads": 1, "width": 128, "dtype": "int8"}]
    page = render(inspect_page("out", summary | {"cache": summary["cache"] | {"tensors": more}}))
    assert holds(rows(page), "index_cache", [1, 128], ("int8",))
    assert "index_cache[B,1,T,128]" in page


def test_pictures_are_readable_by_everyone(pages: dict[str, str]) -> None:
    """REPORT-4：每张图有名字与说明，字不相撞、不出图，颜色随主题，同一节里有表。"""
    for name, page in pages.items():
        root = parsed(page)
        style = "".join(root.find("head/style").itertext())  # type: ignore[union-attr]
        assert "prefers-color-scheme: dark" in style
        assert root.find("head/meta[@name='viewport']") is not None
        assert root.get("lang") == "zh-CN"
        pictures = list(root.iter(f"{SVG}svg"))
        assert pictures, name
        for picture in pictures:
            check_picture(picture)
        for section in root.iter("section"):
            if section.find(f".//{SVG}svg") is not None:
                assert section.find(".//table/caption") is not None, name
                assert all(node.get("scope") for node in section.iter("th"))


def test_contexts_are_drawn_in_order() -> None:
    """REPORT-2：``--depth`` 先后给出、重复给出，图里都从小到大，表里照报告的次序。"""
    report = report_pages.bench_report(against=False)
    shuffled = report.model_copy(update={"depths": [report.depths[i] for i in (2, 0, 3, 0, 1)]})
    page = parsed(render(bench_page(shuffled)))
    dots = [float(dot.get("cx", 0)) for dot in next(page.iter(f"{SVG}svg")).iter(f"{SVG}circle")]
    dots = [x for x in dots if x]  # 图例里的在 0
    assert len(dots) == 5
    assert dots == sorted(dots)


def test_reports_with_nothing_in_a_place_still_make_a_page() -> None:
    """REPORT-1、REPORT-4：一级没有可比的、只有一个上下文、量到的是 0。"""
    report = report_pages.parity_report()
    page = render(
        verify_page(report.model_copy(update={"levels": ["op", "tokens"], "cases": [], "loss": None}))
    )
    assert "没有可比的" in "".join(parsed(page).itertext())
    bench = report_pages.bench_report(against=False)
    for step in (bench.depths[0].step_s["bundle"], Spread.of([0.0])):
        one = bench.model_copy(update={"depths": [report_pages.bench_depth(256, {"bundle": step})]})
        page = render(bench_page(one))
        assert holds(rows(page), "256，被测", [step.median])
        for picture in parsed(page).iter(f"{SVG}svg"):
            check_picture(picture)


def test_bars_are_as_long_as_their_values() -> None:
    """REPORT-5：从 0 起、线性：长短之比就是值之比，差几百倍也不取对数。"""
    values = (1.0, 2.0, 500.0)
    bars = [Bar(f"名字 {value}", value, value, value, f"{value}", 1) for value in values]
    picture = bar_chart("条", "说明。", [Group("组", bars)], note="ms，↓ 越低越好")
    found = report_pages.bars(parsed(picture.standalone()))
    assert len({left for left, _ in found}) == 1
    for (_, length), value in zip(found, values, strict=True):
        assert length / found[-1][1] == pytest.approx(value / values[-1], abs=2e-3)


def test_memory_beyond_the_card_is_cut_and_said(pages: dict[str, str]) -> None:
    """REPORT-5：放不下的截断，不出图；数写在旁边。"""
    small = next(
        p for p in parsed(pages["plan"]).iter(f"{SVG}svg") if "RTX 4090" in (p.get("aria-label") or "")
    )
    assert any("放不下" in words.text for words in report_pages.words(small))
    assert max(left + length for left, length in report_pages.bars(small)) <= 460


PAGE = Page("页", None, [], [Section("节", tables=[Table("表", ("名", "数"), [["a", Number(1.5, "1.5")]])])])


def _file(path: Path) -> None:
    path.write_text("别人的", encoding="utf-8")


def _link(path: Path) -> None:
    target = path.with_name("target.html")
    write_page(target, PAGE)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "make", [_file, _link, Path.mkdir, os.mkfifo], ids=["file", "link", "directory", "fifo"]
)
def test_only_our_own_pages_are_replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """REPORT-3：别人的文件、链接、目录、管道都拒绝，原样留着。"""
    path = tmp_path / "page.html"
    make(path)
    before = path.lstat()
    for refused in (lambda: check_target(path), lambda: write_page(path, PAGE)):
        with pytest.raises(DsxError, match="DSX-E401"):
            refused()
    assert path.lstat() == before


def test_a_page_replaces_a_page_and_needs_a_folder(tmp_path: Path) -> None:
    """REPORT-3：再写一遍换上新的；上级目录不在，动手之前就说。"""
    path = tmp_path / "page.html"
    for title in ("一", "二"):
        write_page(path, Page(title, None, []))
        assert f"<title>{title}</title>" in path.read_text(encoding="utf-8")
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    for missing in (tmp_path / "no/page.html", path / "page.html"):
        with pytest.raises(DsxError, match="DSX-E405"):
            check_target(missing)
