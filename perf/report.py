"""一次运行 → Markdown 表与自包含的 HTML（图内联，不联网，亮暗两色）。"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deepseek_export.bench.spread import Spread
from deepseek_export.cli.console import size
from perf import figures
from perf.gates import Verdict
from perf.results import Run, SuiteResult

_STATUS = {"pass": "达到", "within-spread": "在散布之内", "fail": "不过", "open": "未达到（已知）"}
_BYTES = ("cache_computed", "cache_resident", "loaded", "resident", "peak", "plan_bytes")


def write(run: Run, verdicts: list[Verdict], out: Path) -> list[Path]:
    """写 ``report.md``、``report.html`` 与 ``run.json``。没有中文字体时 HTML 里没有图，并在页首写明。"""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "run.json": run.model_dump_json(indent=1) + "\n",
        "report.md": markdown(run, verdicts),
        "report.html": html(run, verdicts),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def write_figures(run: Run, folder: Path) -> list[Path]:
    """每套一张图，亮色暗色各一份。"""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for suite in run.suites for path in figures.write_themes(suite, folder)]


def verdict_line(verdict: Verdict) -> str:
    """一条结论，一行。"""
    value = f"{verdict.value.median:.3f}（{verdict.value.low:.3f}–{verdict.value.high:.3f}）"
    note = f"：{verdict.note}" if verdict.note and verdict.status != "pass" else ""
    where = f"{verdict.suite} · {verdict.case} · {verdict.ratio}"
    return f"{_STATUS[verdict.status]}  {verdict.id}  {where} = {value}，门槛 {verdict.limit:.3f}{note}"


def markdown(run: Run, verdicts: list[Verdict]) -> str:
    """Markdown：环境、结论、每套一张表。"""
    lines = ["# 性能报告", "", f"{_headline(run)}。", ""]
    lines += [f"- {name}：{value}" for name, value in environment_rows(run)]
    lines += [f"- 跳过：{line}" for line in run.skipped]
    lines += ["", "## 门槛", "", *(f"- {verdict_line(verdict)}" for verdict in verdicts)]
    for suite in run.suites:
        head, *rows = table_rows(suite)
        lines += ["", f"## {suite.title}", "", f"场景：{_scenario(suite)}。", ""]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def html(run: Run, verdicts: list[Verdict]) -> str:
    """自包含的 HTML。"""
    problem, drawn = "", {}
    try:
        for suite in run.suites:
            drawn[suite.suite] = figures.coloured(figures.draw(suite), figures.VARIABLES)
    except figures.NoChineseFont as error:
        problem, drawn = str(error), {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        headline=_headline(run),
        environment=environment_rows(run),
        skipped=run.skipped,
        problem=problem,
        verdicts=[(verdict.status, verdict_line(verdict)) for verdict in verdicts],
        suites=[(s, _scenario(s), table_rows(s), drawn.get(s.suite, "")) for s in run.suites],
        themes={theme: list(colours.values()) for theme, colours in figures.THEMES.items()},
    )


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """环境块，给人看。"""
    e = run.environment
    cpu, memory = e["cpu"], e["memory_bytes"]
    gpus = "、".join(f"{gpu['name']}（驱动 {gpu['driver']}）" for gpu in e["gpus"])
    return [
        ("命令", e["command"]),
        (
            "CPU",
            f"{cpu['model'] or cpu['machine']}，{cpu['cores']} 核（{' '.join(cpu['flags'] or ['标志未知'])}）",
        ),
        ("内存", "未知" if memory is None else size(memory)),
        ("GPU", gpus or "没有"),
        ("系统", f"{e['system']}，Python {e['python']}"),
        ("库", "、".join(f"{name} {version or '未装'}" for name, version in e["libraries"].items())),
        ("线程", str(e["threads"])),
        ("开始时的负载", "未知" if e["load_average"] is None else f"{e['load_average']:.2f}"),
        ("源码", e["git"] or "未知"),
    ]


def table_rows(suite: SuiteResult) -> list[list[str]]:
    """第一行是表头：格子、每个值、每个比值；某一格没有的写「—」。"""
    keys = list(dict.fromkeys(key for case in suite.cases for key in case.values))
    ratios = list(dict.fromkeys(key for case in suite.cases for key in case.ratios))
    rows = [["", *keys, *(f"比值 {name}" for name in ratios)]]
    for case in suite.cases:
        values = [_value(key, case.values[key]) if key in case.values else "—" for key in keys]
        shares = [_spread(case.ratios[key]) if key in case.ratios else "—" for key in ratios]
        rows.append([case.name, *values, *shares])
    return rows


def _headline(run: Run) -> str:
    kind = "缩小的场景，数字不可引用" if run.quick else "完整的场景"
    return f"{run.started}，{kind}；中位数（最小–最大），比值是优化后 / 对照，越小越好"


def _scenario(suite: SuiteResult) -> str:
    return "，".join(f"{key}={_plain(value)}" for key, value in suite.scenario.items())


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _value(key: str, spread: Spread) -> str:
    field = key.rpartition(".")[2]
    if field in _BYTES:
        return f"{size(spread.median)}（{size(spread.low)}–{size(spread.high)}）"
    if field.endswith("_s"):
        return f"{_spread(spread.scaled(1e3))} ms"
    return _spread(spread)


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3g}（{spread.low:.3g}–{spread.high:.3g}）"
