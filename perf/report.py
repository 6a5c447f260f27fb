"""各套的最近一次运行 → Markdown 表与自包含的 HTML（图内联，不联网，亮暗两色）。每一套各带自己的环境。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deepseek_export.report.svg import theme
from deepseek_export.units import size
from perf import figures, labels
from perf.gates import Verdict
from perf.results import Case, Run, SuiteResult
from perf.suites import SUITES

_STATUS = {"pass": "达到", "within-spread": "在散布之内", "fail": "不过", "open": "未达到（已知）"}
LEGEND = "中位数（最小–最大），比值是优化后 / 对照，越小越好"

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """报告里的一套。

    Attributes:
        environment: 只有这一套的，与各套都相同的那几行不在内。
        tables: 量相同的格子一张表，第一行是表头，第一列是量。
        facts: 格子 → 不是重复测量的东西。
    """

    suite: SuiteResult
    environment: Rows
    scenario: str
    tables: list[list[list[str]]]
    facts: list[tuple[str, Rows]]


def write(runs: Sequence[Run], verdicts: list[Verdict], out: Path) -> list[Path]:
    """写 ``report.md``、``report.html`` 与 ``runs.json``。"""
    out.mkdir(parents=True, exist_ok=True)
    raw = [run.model_dump(mode="json") for run in runs]
    texts = {
        "runs.json": json.dumps(raw, ensure_ascii=False, indent=1) + "\n",
        "report.md": markdown(runs, verdicts),
        "report.html": html(runs, verdicts),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def verdict_line(verdict: Verdict) -> str:
    """一条结论，一行。"""
    value = f"{verdict.value.median:.3f}（{verdict.value.low:.3f}–{verdict.value.high:.3f}）"
    note = f"：{verdict.note}" if verdict.note and verdict.status != "pass" else ""
    where = f"{verdict.suite} · {verdict.case} · {verdict.ratio}"
    return f"{_STATUS[verdict.status]}  {verdict.id}  {where} = {value}，门槛 {verdict.limit:.3f}{note}"


def markdown(runs: Sequence[Run], verdicts: list[Verdict]) -> str:
    """Markdown：各套共同的环境、结论，再每套一节。"""
    common, found = sections(runs)
    lines = ["# 性能报告", "", f"{LEGEND}。", "", *_list(common)]
    lines += [f"- 跳过：{line}" for line in _skipped(runs)]
    lines += ["", "## 门槛", "", *(f"- {verdict_line(verdict)}" for verdict in verdicts)]
    for section in found:
        lines += ["", f"## {section.suite.title}", "", *_list(section.environment)]
        lines += [f"- 场景：{section.scenario}"]
        for table in section.tables:
            lines += ["", *table_lines(table)]
        lines += fact_lines(section)
    return "\n".join(lines) + "\n"


def table_lines(table: list[list[str]]) -> list[str]:
    """一张表的 Markdown，第一行是表头。"""
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [head, f"|{'---|' * len(table[0])}", *rows]


def fact_lines(section: Section) -> list[str]:
    """不是重复测量的东西：一格一条，里面各一条；没有就什么都不写。"""
    lines = [""] if section.facts else []
    for case, found in section.facts:
        lines += [f"- {case}", *(f"    {line}" for line in _list(found))]
    return lines


def html(runs: Sequence[Run], verdicts: list[Verdict]) -> str:
    """自包含的 HTML。"""
    common, found = sections(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        legend=LEGEND,
        common=common,
        skipped=_skipped(runs),
        verdicts=[(verdict.status, verdict_line(verdict)) for verdict in verdicts],
        sections=found,
        drawn={section.suite.suite: list(figures.draw(section.suite).values()) for section in found},
        theme=theme(),
    )


def environment_rows(run: Run) -> Rows:
    """环境块，给人看。"""
    e = run.environment
    cpu, memory = e["cpu"], e["memory_bytes"]
    gpus = "、".join(f"{gpu['name']}（驱动 {gpu['driver']}）" for gpu in e["gpus"])
    flags = " ".join(cpu["flags"] or ["标志未知"])
    cores = "核数未知" if cpu["cores"] is None else f"{cpu['cores']} 核"
    return [
        ("时刻", run.started),
        ("源码", e["git"] or "未知"),
        ("命令", e["command"]),
        ("规模", "缩小的场景，数字不可引用" if run.quick else "完整的场景"),
        ("开始时的负载", "未知" if e["load_average"] is None else f"{e['load_average']:.2f}"),
        ("CPU", f"{cpu['model'] or cpu['machine']}，{cores}（{flags}）"),
        ("内存", "未知" if memory is None else size(memory)),
        ("GPU", gpus or "没有"),
        ("系统", f"{e['system']}，Python {e['python']}"),
        ("库", "、".join(f"{name} {version or '未装'}" for name, version in e["libraries"].items())),
        ("C++ 算子库", e.get("cpu_library", "没有记") or "没有"),  # 早先的历史里没有这一项
        ("线程", str(e["threads"])),
    ]


def tables(cases: Sequence[Case]) -> list[list[list[str]]]:
    """量与比值相同的格子放一张表：一行一个量，一列一格；某一格没有的写「—」。"""
    groups: dict[tuple[frozenset[str], frozenset[str]], list[Case]] = {}
    for case in cases:
        fields = frozenset(key.rpartition(".")[2] for key in case.values)
        groups.setdefault((fields, frozenset(case.ratios)), []).append(case)
    return [_table(group) for group in groups.values()]


def _table(cases: list[Case]) -> list[list[str]]:
    keys = dict.fromkeys(key for case in cases for key in case.values)
    ratios = dict.fromkeys(key for case in cases for key in case.ratios)
    rows = [["", *(case.name for case in cases)]]
    for key in keys:
        cells = [labels.measured(key, case.values[key]) if key in case.values else "—" for case in cases]
        rows.append([labels.quantity(key), *cells])
    rows += [[labels.ratio(key), *(labels.share(case.ratios[key]) for case in cases)] for key in ratios]
    return rows


def sections(runs: Sequence[Run]) -> tuple[Rows, list[Section]]:
    """各套都相同的环境，与各套；次序是 :data:`SUITES` 的。"""
    order = list(SUITES)
    found = sorted(
        ((run, suite) for run in runs for suite in run.suites), key=lambda pair: order.index(pair[1].suite)
    )
    environments = [environment_rows(run) for run, _ in found]
    common = [row for row in environments[0] if all(row in rows for rows in environments)] if found else []
    return common, [
        Section(
            suite=suite,
            environment=[row for row in rows if row not in common],
            scenario=labels.scenario(suite.scenario),
            tables=tables(suite.cases),
            facts=[(case.name, shown) for case in suite.cases if (shown := labels.facts(case.facts))],
        )
        for (_, suite), rows in zip(found, environments, strict=True)
    ]


def _skipped(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(line for run in runs for line in run.skipped))


def _list(rows: Rows) -> list[str]:
    return [f"- {name}：{value}" for name, value in rows]
