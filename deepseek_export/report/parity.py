"""``dsx verify --html`` 与 ``dsx compare --html`` 的页：每一层的误差离容差多远，近平局，最坏的坐标。"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from deepseek_export.report.dots import Row, share_chart
from deepseek_export.report.measures import COLUMNS, cells, failure_rows, loss_rows, worst
from deepseek_export.report.page import Cell, Code, Number, Page, Section, Table, Verdict, integer, scientific
from deepseek_export.report.svg import Picture

if TYPE_CHECKING:
    from deepseek_export.parity.bisect import Culprit
    from deepseek_export.parity.compare import ComparisonReport
    from deepseek_export.parity.report import Case, ParityReport

#: 每个层级比什么。
MEANINGS = {
    "activations": "激活的范围",
    "op": "dsx 算子",
    "block": "每层的注意力与前馈",
    "model": "logits",
    "tokens": "greedy 续写",
    "loss": "舍入的损失",
}
_MEASURES = ("最大绝对差", "calc_diff", "|范数比 - 1|")
#: 图里至多几行，再多就一层并成一行。
_ROWS = 80
#: 同一处的几次（阶段、形状、走法）并成图里的一行。
_TIMES = re.compile(r" \((?:prefill|decode)\)$| [BN]=\d.*$| \(\d+ tokens\)$")
_LAYER = re.compile(r"(.*?\blayers\.\d+)\b.*")
_CASE_COLUMNS = (
    *("哪一项", "结果", "最大绝对差", "限", "calc_diff", "限", "|范数比 - 1|", "限"),
    *("近平局", "最坏的坐标", "那里得到", "PyTorch 是", "参照的均方根", "个数", "说明"),
)


def verify_page(report: ParityReport) -> Page:
    """``dsx verify`` 的结果。"""
    sections = [_summary(report), *_failure(report.first_failure, "第一处不通过", ())]
    for level in report.levels:
        cases = [case for case in report.cases if case.level == level]
        measured = [case for case in cases if case.measure is not None]
        pictures = [_picture(f"{level} 级的误差", measured)] if measured else []
        table = _cases(f"{level} 级的全部 {len(cases)} 项", [((case.name,), case) for case in cases])
        lead = [] if cases else ["没有可比的，原因见“注意”。"]
        title = f"{level}：{MEANINGS[level]}"
        sections.append(Section(title, lead, pictures=pictures, tables=[table] if cases else []))
    if report.loss is not None:
        sections.append(Section("权重量化的损失（对未量化的基准）", facts=loss_rows(report.loss)))
    sections.append(_tolerances(report.cases))
    if report.notes:
        sections.append(Section("注意", notes=report.notes))
    if report.polygraphy is not None:
        sections.append(Section("离开 dsx 重复", facts=[("命令", Code(report.polygraphy))]))
    return Page(
        f"dsx verify：{report.bundle}",
        Verdict(report.passed, "全部通过" if report.passed else "不通过"),
        [*_about(report), ("基准", report.oracle), ("版本", _versions(report.environment))],
        sections,
    )


def compare_page(report: ComparisonReport) -> Page:
    """``dsx compare`` 的结果。"""
    first = report.first_failure
    where = () if first is None else (("图", first.graph), ("块", first.block), ("后端", first.backend))
    sections = [*_failure(None if first is None else first.case, "第一个不对的块", where)]
    if report.culprit is not None:
        sections.append(_culprit(report.culprit))
    for graph, backend in dict.fromkeys((row.graph, row.backend) for row in report.cases):
        rows = [row for row in report.cases if (row.graph, row.backend) == (graph, backend)]
        cases = [row.case for row in rows]
        measured = [case for case in cases if case.measure is not None]
        table = _cases(
            f"{graph} 在 {backend} 上的全部 {len(rows)} 项",
            [((row.case.name, row.block, row.phase), row.case) for row in rows],
        )
        pictures = [_picture(f"{graph} 各块的误差", measured)] if measured else []
        lead = ["每个块的输入都由 PyTorch 喂，上游的错误传不到下游。"]
        sections.append(Section(f"{graph}，{backend} 对 PyTorch", lead, pictures=pictures, tables=[table]))
    sections.append(_tolerances([row.case for row in report.cases]))
    commands = [(name, Code(line)) for name, line in report.commands.items()]
    sections.append(Section("离开 dsx 重复", facts=[("存在", Code(report.folder)), *commands]))
    return Page(
        f"dsx compare：{report.bundle}",
        Verdict(report.passed, "全部一致" if report.passed else "不一致"),
        [*_about(report), ("后端", "、".join(report.backends)), ("版本", _versions(report.environment))],
        sections,
    )


def _about(report: ParityReport | ComparisonReport) -> list[tuple[str, Cell]]:
    return [
        ("bundle", Code(report.bundle)),
        ("检查点", Code(report.checkpoint)),
        ("方案", f"{report.profile}，目标 {report.target}，{report.dtype}"),
    ]


def _versions(environment: dict[str, str]) -> str:
    return "、".join(f"{name} {version}" for name, version in environment.items())


def _summary(report: ParityReport) -> Section:
    rows: list[list[Cell]] = []
    failed = set()
    for index, level in enumerate(report.levels):
        row = worst([case for case in report.cases if case.level == level])
        verdict = Verdict(not row["failed"], f"{row['failed']} 项不过" if row["failed"] else "通过")
        if row["failed"]:
            failed.add(index)
        if not row["cases"]:
            verdict = Verdict(True, "没有可比的")
        *numbers, ties = cells(row)
        values = [
            row["max_abs"],
            row["calc_diff"],
            None if row["norm_ratio"] is None else abs(row["norm_ratio"] - 1),
        ]
        shown = [Number(value, text) for value, text in zip(values, numbers, strict=True)]
        rows.append(
            [level, MEANINGS[level], integer(row["cases"]), *shown, Number(row["near_ties"], ties), verdict]
        )
    columns = ("层级", "比什么", "项数", *COLUMNS, "结果")
    lead = ["三个量各取最坏的一项；近平局是两个候选几乎同分、换一个不算错的行数，单独计数。"]
    return Section("各层级", lead, tables=[Table("各层级的结果", columns, rows, frozenset(failed))])


def _failure(case: Case | None, title: str, where: Iterable[tuple[str, str]]) -> list[Section]:
    if case is None:
        return []
    place = [*where, ("层级", case.level), ("哪一项", case.name)]
    return [Section(title, facts=[*place, *failure_rows(case)])]


def _culprit(culprit: Culprit) -> Section:
    facts: list[tuple[str, Cell]] = [
        ("比过", f"{culprit.block} ({culprit.phase}) 里的 {culprit.checked} 个值，各自用 PyTorch 的输入")
    ]
    tables = []
    if culprit.case is None:
        facts.append(("节点", "每个值单独算都对：毛病在它们合起来的时候"))
    else:
        facts += [("输出", Code(culprit.value)), *failure_rows(culprit.case)]
        rows: list[list[Cell]] = [
            [
                Code(node.name),
                node.op,
                "、".join(node.inputs),
                "、".join(f"{k}={v}" for k, v in node.attributes.items()),
            ]
            for node in culprit.nodes
        ]
        tables = [
            Table("从上一批 PyTorch 的值算到它的节点，最后一个产生它", ("节点", "算子", "输入", "属性"), rows)
        ]
    facts += [("原因", cause) for cause in culprit.causes]
    return Section("第一个不对的节点", facts=[*facts, ("逐节点重复", Code(culprit.command))], tables=tables)


def _cases(caption: str, rows: Sequence[tuple[tuple[str, ...], Case]]) -> Table:
    placed = ("块", "阶段")[: len(rows[0][0]) - 1] if rows else ()
    made: list[list[Cell]] = [[*names, *_case(case)] for names, case in rows]
    failed = frozenset(index for index, (_, case) in enumerate(rows) if not case.passed)
    return Table(caption, (_CASE_COLUMNS[0], *placed, *_CASE_COLUMNS[1:]), made, failed)


def _case(case: Case) -> list[Cell]:
    verdict = Verdict(case.passed, "通过" if case.passed else "不过")
    ties = integer(case.near_ties)
    m, limit = case.measure, case.tolerance
    if m is None or limit is None:
        return [verdict, *["-"] * 6, ties, *["-"] * 5, case.note]
    return [
        verdict,
        scientific(m.max_abs),
        scientific(limit.limit(m.scale)),
        scientific(m.calc_diff),
        scientific(limit.calc_diff),
        scientific(abs(m.norm_ratio - 1)),
        scientific(limit.norm),
        ties,
        f"[{', '.join(map(str, m.coordinate))}]",
        Number(m.got, f"{m.got:.7g}"),
        Number(m.want, f"{m.want:.7g}"),
        Number(m.scale, f"{m.scale:.3g}"),
        integer(m.count),
        case.note,
    ]


def _picture(title: str, cases: Sequence[Case]) -> Picture:
    """同一处的几次并成一行，行太多再把一层并成一行；各取最坏的。"""
    groups = _grouped(cases, lambda name: _TIMES.sub("", name))
    if len(groups) > _ROWS:
        groups = _grouped(cases, lambda name: _LAYER.sub(r"\1", _TIMES.sub("", name)))
    rows = []
    for name, found in groups.items():
        shares = zip(*(_shares(case) for case in found), strict=True)
        ties = sum(case.near_ties for case in found)
        rows.append(
            Row(
                name,
                [max((share for share in one if share is not None), default=None) for one in shares],
                all(case.passed for case in found),
                f"近平局 {ties}" if ties else "",
            )
        )
    failed = sum(not row.passed for row in rows)
    state = f"{failed} 行越过容差线，用红框标出" if failed else "全部在容差线的左边"
    description = (
        f"{len(rows)} 行，每行是一处的三个量占容差的几分之几，取最坏的一次；{state}。数在旁边的表里。"
    )
    return share_chart(title, description, rows, _MEASURES)


def _grouped(cases: Iterable[Case], key: Callable[[str], str]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case.name), []).append(case)
    return groups


def _shares(case: Case) -> list[float | None]:
    """三个量各占容差的几分之几；容差不限的没有。"""
    m, limit = case.measure, case.tolerance
    if m is None or limit is None:
        return [None] * 3
    pairs = (
        (m.max_abs, limit.limit(m.scale)),
        (m.calc_diff, limit.calc_diff),
        (abs(m.norm_ratio - 1), limit.norm),
    )
    return [None if most == float("inf") else value / most for value, most in pairs]


def _tolerances(cases: Iterable[Case]) -> Section:
    used = dict.fromkeys(case.tolerance for case in cases if case.tolerance is not None)
    rows: list[list[Cell]] = [
        [limit.reason, scientific(limit.max_abs), scientific(limit.calc_diff), scientific(limit.norm)]
        for limit in used
    ]
    lead = ["最大绝对差的限 = 容差 × max(1, 参照的均方根)；三个量都在限内才通过，命令行上放不宽。"]
    columns = ("为什么是这些数", "最大绝对差", "calc_diff", "|范数比 - 1|")
    return Section("用到的容差", lead, tables=[Table("用到的容差", columns, rows)] if rows else [])
