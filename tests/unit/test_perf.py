"""perf/：统计、门槛、退步、历史、报告与图。测量本身不在测试里跑。"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from deepseek_export.bench.spread import Spread
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.reference import Forms, load_draft, load_reference
from perf import figures, gates, isolate, labels, report, results, tensorrt_build
from perf.padded import write_padded
from perf.results import Case, Run, SuiteResult
from perf.suites import SUITES, mtp, peers
from perf.workspace import SHAPES, Workspace, parameter_count

pytestmark = [
    pytest.mark.unit,
    # 测试用随 matplotlib 带的字体画，没有汉字的字形。
    pytest.mark.filterwarnings("ignore:Glyph .* missing from font"),
]

ENVIRONMENT = {
    "command": "python -m perf run",
    "cpu": {"model": "某 CPU", "machine": "x86_64", "cores": 2, "flags": ["avx2"]},
    "memory_bytes": 8 << 30,
    "load_average": 0.1,
    "gpus": [],
    "system": "Linux",
    "python": "3.11",
    "libraries": {"onnxruntime": "1.32.0", "transformers": None},
    "threads": 2,
    "git": "abc1234",
}


def spread(*samples: float) -> Spread:
    return Spread.of(samples)


def memory_case(name: str, ratio: Spread) -> Case:
    fields = ("cache_computed", "cache_resident", "peak")
    values = {
        f"{profile}.{field}": spread(size, size * 1.1)
        for profile, size in (("baseline", 5e8), ("mla", 1e8))
        for field in fields
    }
    return Case(name=name, values=values, ratios={"cache": ratio, "process": ratio})


def suite(name: str, cases: list[Case]) -> SuiteResult:
    title = import_module(SUITES[name]).TITLE
    return SuiteResult(suite=name, title=title, scenario={"context": 8192, "batches": [1, 4]}, cases=cases)


def every_suite() -> list[SuiteResult]:
    """每套一份小结果，字段与真的相同。"""
    one = spread(0.01, 0.012, 0.011)
    decode = [
        Case(
            name=f"context {context}",
            values={f"{name}.step_s": one for name in ("baseline", "naive", "absorb", "transformers")},
            ratios={"absorb/transformers": spread(0.1, 0.2)},
            facts={"context": context},
        )
        for context in (256, 8192)
    ]
    speculation = Case(
        name="demo b8",
        values={"plain.token_s": one, "speculative.token_s": one, "speculative.round_cost": spread(2.0)},
        ratios={"time": spread(1.9, 2.1)},
        facts={"acceptances": list(mtp.ACCEPTANCES), "curve": [2.0] * len(mtp.ACCEPTANCES)},
    )
    experts = Case(
        name="b1",
        values={f"{n}.{field}": one for n in ("moe", "off", "dense") for field in ("token_s", "prefill_s")},
        ratios={"decode moe/off": spread(0.3), "decode moe/dense": spread(0.4)},
    )
    quality = Case(
        name="demo",
        values={"moe.held_loss": spread(3.0), "dense.held_loss": spread(3.1)},
        ratios={"held loss moe/dense": spread(0.97)},
        facts={
            "steps": [1, 2],
            "curves": {name: [4.0, 3.0] for name in ("moe", "no-bias", "dense")},
            "loads": {name: [[3.0, 1.0], [2.0, 2.0]] for name in ("moe", "no-bias")},
        },
    )
    sizes = Case(
        name="0.1B",
        values={"dsx.seconds": one, "dsx.peak": spread(4e8)},
        facts={"parameters": 1e8},
    )
    layers = Case(name="V3 61 层 / 4 层", values={"61.seconds": one}, ratios={"capture": spread(1.0)})
    engine = Case(
        name="引擎 8 层",
        values={"dsx.seconds": one, "dsx.peak": spread(1e9), "dsx.plan_bytes": spread(9e6)},
        facts={"layers": 8},
    )
    speeds = [
        Case(
            name=name,
            values={f"{engine}.{peers.RATE}": spread(30.0, 33.0) for engine in peers.SERIES},
            ratios={f"dsx 块 128/{peers.LLAMA}": spread(0.3, 0.4)},
        )
        for name in ("prefill 256", "depth 0", "depth 8192")
    ]
    memory = Case(name="内存", values={f"{engine}.peak": spread(2e9) for engine in peers.SERIES})
    return [
        suite("mla-memory", [memory_case("v3 b1 float32", spread(0.1, 0.12))]),
        suite("mla-decode", decode),
        suite("mtp", [speculation, speculation.model_copy(update={"name": "padded b8"})]),
        suite("moe", [experts]),
        suite("moe-quality", [quality]),
        suite("compile", [sizes, layers, engine]),
        suite("peers", [*speeds, memory]),
    ]


def make_run(suites: list[SuiteResult], quick: bool = False, **environment: object) -> Run:
    return Run(
        started="2026-01-01T00:00:00+00:00",
        quick=quick,
        environment=ENVIRONMENT | environment,
        suites=suites,
        skipped=["peers：没有装"],
    )


def test_history_is_append_only_and_latest_prefers_full_runs(tmp_path):
    path = tmp_path / "results/history.jsonl"
    assert results.load(path) == []
    with pytest.raises(ValueError, match="python -m perf run"):
        results.latest([])
    full = make_run([suite("mla-memory", [memory_case("full", spread(0.1))])])
    quick = make_run([suite("mla-memory", [memory_case("quick", spread(0.2))])], quick=True)
    for run in (full, quick):
        before = path.read_text() if path.exists() else ""
        results.append(run, path)
        assert path.read_text().startswith(before)
    assert results.load(path) == [full, quick]
    assert [run.suites for run in results.latest([full, quick])] == [full.suites, []]
    assert results.latest([quick])[0].quick
    # 另一种配置的结果不混进同一份报告。
    other = make_run([suite("moe", [])], threads=4)
    assert [run.suites for run in results.latest([full, other])] == [other.suites]


def test_every_suite_reports_its_own_environment():
    """几次运行拼成的报告：各套写自己的版本、时刻与负载，都相同的只在开头写一次；已有结果的套件不再写跳过。"""
    old = make_run([suite("mla-memory", [memory_case("a", spread(0.1))])], git="1111111")
    found = [one for one in every_suite() if one.suite == "peers"]
    new = make_run(found, git="2222222", load_average=1.5)
    runs = results.latest([old, new])
    assert [run.skipped for run in runs] == [[], []]
    text, page = report.markdown(runs, []), report.html(runs, [])
    common, memory, beside = (re.split(r"^## ", text, flags=re.MULTILINE)[i] for i in (0, 2, 3))
    assert "某 CPU" in common
    assert "源码" not in common
    assert "源码：1111111" in memory
    assert "开始时的负载：0.10" in memory
    assert "源码：2222222" in beside
    assert "开始时的负载：1.50" in beside
    assert text.count("某 CPU") == page.count("某 CPU") == 1
    assert (
        page.index('id="mla-memory"')
        < page.index("1111111")
        < page.index('id="peers"')
        < page.index("2222222")
    )


def test_numbers_have_units_and_no_exponents():
    assert labels.measured("plain.decode_s", spread(43.6)) == "43.6 s"
    assert labels.measured("plain.decode_s", spread(0.4, 0.41)) == "405（400–410）ms"
    assert labels.measured("mla.peak", spread(3 << 30, 4.5 * (1 << 30))) == "3.75（3.00–4.50）GiB"
    assert labels.measured("dsx.tokens_per_second", spread(10000.0)) == "10,000"
    assert labels.measured("dsx.plan_bytes", spread(0.0)) == "0.00 B"
    assert labels.share(spread(1.0007)) == "1.001"
    assert labels.share(spread(0.0141, 0.0151)) == "0.0146（0.0141–0.0151）"
    assert labels.quantity("baseline.cache_computed") == "baseline：缓存，按形状算"
    assert labels.quantity("dsx.没登记的") == "dsx：没登记的"
    assert (
        labels.scenario({"shapes": ("v2-lite", "v3"), "hidden_size": 8}) == "形状 v2-lite / v3，hidden_size 8"
    )


def test_facts_are_in_the_report():
    """不是重复测量的也要看得到：接受率、盈亏平衡、专家负载、失败的原话、编译选项；没登记的照写，画在图里的不写。"""
    found = {
        "speculation": {
            "acceptance": [0.695, 0.5],
            "mean_accepted": 1.5,
            "tokens_per_call": 2.5,
            "fell_back": True,
        },
        "break_even": None,
        "curve": [12345.0],
        "balance": {"moe": [[1.02, 0.99], [2.5, 0.8]]},
        "peer_error": "RuntimeError: 原话",
        "failed": {"transformers compile": "超过 300 秒"},
        "build": "AVX512 = 1 | <b>",
        "没登记的": {"a": [1, 2]},
        "parameters": {"moe": 208778336},
    }
    case = Case(name="demo b8", values={"plain.token_s": spread(1.0)}, facts=found)
    run = make_run([suite("moe", [case])])
    for expected in (
        "69.5 %、50.0 %；平均接受 1.50 个，主模型每次调用产出 2.50 个 token；中途止损",
        "全中也不划算",
        "稀疏专家 1.02、2.50（熵 0.990、0.800）",
        "RuntimeError: 原话",
        "transformers compile 超过 300 秒",
        "a 1、2",
        "稀疏专家 2.09 亿",
    ):
        assert expected in report.markdown([run], [])
    assert "12345" not in report.markdown([run], [])
    assert ("盈亏平衡的接受率", "39.3 %") in labels.facts({"break_even": 0.393})


def test_tables_group_cases_with_the_same_quantities():
    """量不同的格子不挤在一张表里；同一组里缺的写「—」。"""
    speeds = [
        Case(name=n, values={f"{e}.seconds": spread(1.0) for e in es}) for n, es in (("a", "xy"), ("b", "x"))
    ]
    memory = Case(name="内存", values={"x.peak": spread(1024.0)})
    assert report.tables([*speeds, memory]) == [
        [["", "a", "b"], ["x：用时", "1.00 s", "1.00 s"], ["y：用时", "1.00 s", "—"]],
        [["", "内存"], ["x：内存峰值", "1.00 KiB"]],
    ]


def test_gate_statuses():
    """中位数达到；超了而范围够得着；够不着；够不着但写明了未达到。"""
    limits = gates.Gates(
        regression_slack=0.05,
        gates=[
            gates.Gate(id="MLA-4", suite="mla-memory", ratio="cache", max=0.6, kind="memory"),
            gates.Gate(
                id="MLA-4", suite="mla-memory", case="b", ratio="process", max=0.6, kind="memory", open="原因"
            ),
        ],
    )
    cases = [memory_case("a", spread(0.5, 0.7, 0.6)), memory_case("b", spread(0.7, 0.8))]
    cases.append(memory_case("c", spread(0.59, 0.61, 0.62)))
    verdicts = gates.check([make_run([suite("mla-memory", cases)])], limits)
    found = [(v.case, v.ratio, v.status) for v in verdicts]
    assert found == [
        ("a", "cache", "pass"),
        ("b", "cache", "fail"),
        ("c", "cache", "within-spread"),
        ("b", "process", "open"),
    ]
    assert "原因" in report.verdict_line(verdicts[-1])
    assert gates.check([make_run([])], limits) == []
    limits.gates[1] = limits.gates[1].model_copy(update={"full": True})
    quick = make_run([suite("mla-memory", cases[:1])], quick=True)  # 没有 b，缩小的场景不看它
    assert [v.ratio for v in gates.check([quick], limits)] == ["cache"]
    with pytest.raises(ValueError, match="process"):
        gates.check([make_run([suite("mla-memory", cases[:1])])], limits)


def test_regression_needs_disjoint_ranges_on_the_same_machine():
    limits = gates.load_gates()

    def run(*samples: float, **environment: object) -> Run:
        return make_run([suite("mla-memory", [memory_case("a", spread(*samples))])], **environment)

    history = [run(0.9), run(0.10, 0.12)]
    found = gates.regressions(run(0.20, 0.22), history, limits)
    assert [(v.ratio, v.kind, v.status) for v in found] == [
        ("cache", "memory", "fail"),
        ("process", "memory", "fail"),
    ]
    assert "0.110" in found[0].note
    assert gates.regressions(run(0.115, 0.3), history, limits) == []  # 范围相交
    assert gates.regressions(run(0.1201, 0.1201), [run(0.12)], limits) == []  # 不到 5%
    assert gates.regressions(run(0.20, 0.22, threads=4), history, limits) == []  # 不是同一种配置


def test_break_even():
    """一轮的耗时等于一轮平均产出的 token 数时，不赚不赔。"""
    assert mtp.tokens_per_round(0, 3) == 1
    assert mtp.tokens_per_round(1, 3) == 4
    assert mtp.break_even(0.9, 3) == 0
    assert mtp.break_even(4.1, 3) is None
    for cost in (1.5, 2.0, 3.9):
        assert mtp.tokens_per_round(mtp.break_even(cost, 3), 3) == pytest.approx(cost)


def test_report_is_self_contained_and_every_figure_parses(tmp_path):
    run = make_run(every_suite())
    verdicts = gates.check([run], gates.load_gates())
    assert {v.id for v in verdicts} == {gate.id for gate in gates.load_gates().gates}
    paths = report.write([run], verdicts, tmp_path)
    assert [path.name for path in paths] == ["runs.json", "report.md", "report.html"]
    assert [Run.model_validate(found) for found in json.loads(paths[0].read_text())] == [run]
    text, page = paths[1].read_text(), paths[2].read_text()
    for expected in (
        "MLA 的内存",
        "baseline：内存峰值",
        "peers：没有装",
        "某 CPU",
        "未达到（已知）",
        "abc1234",
    ):
        assert expected in text
        assert expected in page
    # 除了 XML 命名空间，没有任何网址，也没有外部资源。
    assert all(part.startswith("://www.w3.org/") for part in page.split("http")[1:])
    assert "src=" not in page
    assert "prefers-color-scheme: dark" in page


def test_figures_use_a_chinese_font_or_say_so(tmp_path, monkeypatch):
    """没有中文字体：报告照写，页首说明怎么办，没有图；有就把每张图画成合法的 SVG，占位颜色全部换掉。"""
    run = make_run(every_suite())
    monkeypatch.setattr(figures, "FONTS", ("没有这个字体",))
    page = report.html([run], [])
    assert "fonts-wqy-zenhei" in page
    assert "<svg" not in page
    with pytest.raises(figures.NoChineseFont):
        figures.draw(run.suites[0])
    # 用随 matplotlib 带的字体画，缺的字形是方框，但版式、颜色与结构照验。
    monkeypatch.setattr(figures, "FONTS", ("DejaVu Sans",))
    paths = report.write_figures([run], tmp_path)
    assert len(paths) == 2 * len(SUITES)
    for path in paths:
        text = path.read_text()
        ET.fromstring(text)
        colours = figures.THEMES[path.stem.rpartition("-")[2]]
        assert all(colour in text for colour in colours.values())
        assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", text)) <= set(
            re.findall(r' id="([^"]+)"', text)
        )
        assert not any(placeholder in text for placeholder in colours)
    page = report.html([make_run(every_suite()[:1])], [])
    assert page.count("<svg") == 1
    assert "var(--ink)" in page


def test_a_font_of_one_odd_weight_draws_without_warnings(monkeypatch, caplog):
    """文泉驿自称 500 的字重：不该每张图警告一次找不到 normal。"""
    fonts = figures.font_manager.fontManager.ttflist
    plain = next(entry for entry in fonts if entry.name == "DejaVu Sans")
    odd = replace(plain, name="Only Medium", weight=500)
    monkeypatch.setattr(figures.font_manager.fontManager, "ttflist", [*fonts, odd])
    monkeypatch.setattr(figures, "FONTS", ("Only Medium",))
    figures.draw(every_suite()[0])
    assert not caplog.text


def test_every_suite_is_declared_with_its_scenario():
    """每套都有标题与两种场景；缩小的真的小，不是另一回事。"""
    for name, module in SUITES.items():
        found = import_module(module)
        assert found.TITLE
        assert type(found.FULL) is type(found.QUICK)
        assert found.QUICK != found.FULL
        assert name in {gate.suite for gate in gates.load_gates().gates}


def test_shapes_are_what_they_claim(tmp_path):
    """两种头展开的缓存一样大；稠密对照的总参数只差 router；导出用的三个规模名副其实。"""
    expanded = {
        name: SHAPES[name]["num_attention_heads"] * 320 * SHAPES[name]["num_hidden_layers"]
        for name in ("v2-lite", "v3")
    }
    assert expanded["v2-lite"] == expanded["v3"]
    workspace = Workspace(tmp_path)
    counts = {
        name: parameter_count(workspace.checkpoint(name, sparse=True))
        for name in ("wide-4", "wide-4-dense", "0.1B", "0.9B", "4B")
    }
    routers = 3 * 32 * (1024 + 1)  # 三层，每层权重加偏置校正
    assert counts["wide-4"] - counts["wide-4-dense"] == routers
    for name in ("0.1B", "0.9B", "4B"):
        assert counts[name] / 1e9 == pytest.approx(float(name[:-1]), rel=0.25)


def test_padded_demo_computes_the_same_function(tmp_path):
    """放大只补零、加的层什么也不改：主模型与草稿的 logits 不变。"""
    shape = {"num_hidden_layers": 6, "intermediate_size": 448, "moe_intermediate_size": 160}
    padded = write_padded(CHECKPOINT, tmp_path / "padded", shape)
    ids = torch.tensor([[5, 80, 300, 7, 11, 42]])
    every, past = torch.arange(6)[None], torch.zeros(1, dtype=torch.long)
    main, draft = [], []
    for checkpoint in (Checkpoint.open(CHECKPOINT), Checkpoint.open(padded)):
        model = load_reference(checkpoint, Forms("naive", "sparse"))
        module = load_draft(checkpoint, 0, model)
        with torch.no_grad():
            logits, hidden, _ = model(ids, past, every, model.empty_caches(1, 6))
            main.append(logits)
            draft.append(module(ids, hidden, past, every, model.empty_caches(1, 6)[0])[0])
    torch.testing.assert_close(main[1], main[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(draft[1], draft[0], atol=1e-4, rtol=0)


def test_isolated_call_reports_its_own_process():
    found = isolate.call("tests.isolated:prepare", value=1)
    assert found["value"] == 2
    assert found["peak"] > 0
    assert found["seconds"] >= 0
    with pytest.raises(RuntimeError, match="prepare"):
        isolate.call("tests.isolated:prepare", wrong=1)


def test_engine_curve_says_when_it_was_not_measured(monkeypatch, tmp_path):
    """TRT-10：没有装 TensorRT-RTX 时，报告里有一行写明没有测，别的照常。"""
    monkeypatch.setattr("deepseek_export.engine.flavour.Flavour.version", lambda self: None)
    found = tensorrt_build.cases(tmp_path, (8,), 1)
    assert "没有装 tensorrt_rtx" in report.markdown([make_run([suite("compile", found)])], [])
