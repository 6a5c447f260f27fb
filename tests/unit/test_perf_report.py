"""perf/ 的报告与图：环境、中文名、单位、表、图。"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest

from perf import figures, gates, labels, report, results
from perf.results import Case, Run
from perf.suites import SUITES, mtp
from tests.perf_runs import every_suite, make_run, memory_case, spread, suite
from tests.report_pages import SVG, bars, check_picture

pytestmark = pytest.mark.unit


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


def test_environment_says_whether_the_cpu_library_was_used():
    """没有库，同一个 bundle 走函数体，内存与时间都不同。"""
    found = {
        library: dict(report.environment_rows(make_run([], cpu_library=library)))["C++ 算子库"]
        for library in ("avx512", None)
    }
    assert found == {"avx512": "avx512", None: "没有"}
    assert ("C++ 算子库", "没有记") in report.environment_rows(make_run([]))


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


def test_every_registered_suite_is_drawn():
    """REPORT-4：每张图都是合法的 SVG，有名字与说明，字不相撞、不出图；单独的文件自带两种主题，文字仍是文字。"""
    assert set(figures.FIGURES) < set(SUITES)
    names = []
    for one in every_suite():
        drawn = figures.draw(one)
        assert bool(drawn) == (one.suite in figures.FIGURES)
        for name, picture in drawn.items():
            assert name.startswith(one.suite)
            names.append(name)
            text = picture.standalone()
            check_picture(ET.fromstring(text))
            assert "prefers-color-scheme: dark" in text
            assert picture.title in text
            assert "href" not in text
    assert len(names) == len(set(names))
    page = report.html([make_run(every_suite())], [])
    assert page.count("<svg") == len(names)


def test_pictures_of_the_history_are_readable():
    """REPORT-4：真的历史画出来的，名字与数字更长，也不相撞。"""
    for run in results.newest(results.load()):
        for picture in figures.draw(run.suites[0]).values():
            check_picture(ET.fromstring(picture.standalone()))


def test_bars_are_linear_and_say_which_way_is_better():
    """REPORT-5：条的长短就是值之比，差七十倍也不取对数；每张量时间、内存、速度的图写着哪边好。"""
    for run in results.newest(results.load()):
        one = run.suites[0]
        for name, picture in figures.draw(one).items():
            if name != "moe-quality-load":  # 负载越匀越好，写在轴上
                assert figures.LOWER in picture.body or figures.HIGHER in picture.body, name
        if one.suite == "mla-memory":
            found = bars(ET.fromstring(figures.draw(one)["mla-memory-cache"].standalone()))
            lengths = iter(length for _, length in found)
            longest = max(length for _, length in found)
            largest = max(case.values["baseline.cache_resident"].median for case in one.cases)
            for case in one.cases:
                for key in ("mla.cache_resident", "baseline.cache_resident"):
                    share = case.values[key].median / largest
                    assert next(lengths) / longest == pytest.approx(share, abs=1e-3)


def test_measured_acceptance_is_on_the_break_even_curves():
    """REPORT-6：每个场景一个圈，横是实测的接受率，纵是实测的比值，都在名字里念得出。"""
    found = next(run.suites[0] for run in results.newest(results.load()) if run.suites[0].suite == "mtp")
    picture = figures.draw(found)["mtp-break-even"]
    rings = [
        node
        for node in ET.fromstring(picture.standalone()).iter(f"{SVG}circle")
        if "hollow" in node.get("class", "")
    ]
    rings = [ring for ring in rings if ring.find(f"{SVG}title") is not None]
    assert len(rings) == len(found.cases)
    for case in found.cases:
        stats = case.facts["speculation"]
        at = figures.equivalent_acceptance(stats["tokens_per_call"], stats["num_draft_tokens"])
        assert mtp.tokens_per_round(at, stats["num_draft_tokens"]) == pytest.approx(stats["tokens_per_call"])
        assert min(stats["acceptance"]) - 0.02 <= at <= max(stats["acceptance"])
        assert (
            f"{case.name}：实测接受率 {at:.1%}，比值 {case.ratios['time'].median:.2f}" in picture.description
        )
