"""由历史写的页：``docs/performance.md``、``docs/perf/`` 里的图、两份 README 里的三个数字、大模型一页里的用时与内存，与 ``dsx plan`` 带着的模拟误差。测试核对它们就是这里写出来的，所以没有一个数是抄的。

    python -m perf pages

每一套取最近一次完整的运行，不论在哪台机器上；每一节写着它自己的机器与命令。
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from deepseek_export.plan.result import ModelError, Validation
from deepseek_export.plan.validation import VALIDATION_FILE
from deepseek_export.units import size
from perf import figures, gates, labels, report
from perf.results import ROOT, Run, newest

PAGE = ROOT / "docs/performance.md"
PICTURES = ROOT / "docs/perf"
LARGE = ROOT / "docs/large-models.md"
READMES: Mapping[str, Path] = MappingProxyType({"zh": ROOT / "README.md", "en": ROOT / "README.en.md"})

_HEAD = """\
# 性能

由 `perf/history/runs.jsonl` 写出（`python -m perf pages`），不要手改。每一套是最近一次完整的运行，机器与命令写在各节里；同一次运行里交替测量、逐对相除。
{legend}。为什么是这样的场景、为什么到不了、试过什么没有用，见[数字背后的话](perf/README.md)。

重复任何一套：`python -m perf run 名字`。
"""
#: 套件 → 说它的那一页；没有的不写。
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "mla-memory": "perf/mla.md",
        "apply": "perf/mla.md",
        "mtp": "perf/mtp.md",
        "moe-quality": "perf/moe-quality.md",
        "peers": "peers.md",
        "peers-torch": "peers.md",
        "cpu-kernel": "perf/cpu.md",
        "decode-profile": "perf/cpu.md",
        "int8-cache": "perf/precision.md",
        "quant": "perf/precision.md",
    }
)


@dataclass(frozen=True)
class Headline:
    """README 里的一个数字。

    Attributes:
        suite, case, ratio: 历史里的哪一格、哪个比值。
        words: 语言 → 一句话。
    """

    suite: str
    case: str
    ratio: str
    words: Mapping[str, str]


HEADLINES = (
    Headline(
        "mla-memory",
        "v3 b1 float32",
        "cache",
        {
            "zh": "8192 个 token 的 KV 缓存，V3 的头：`mla` / 展开",
            "en": "KV cache of 8192 tokens, V3 heads: `mla` / expanded",
        },
    ),
    Headline(
        "peers",
        "depth 8192",
        "dsx/llama.cpp Q8_0",
        {
            "zh": "上下文 8192 时解码一步，9.3 亿参数的 V3：dsx int8 / llama.cpp Q8_0",
            "en": "One decode step at context 8192, a 0.93 B V3: dsx int8 / llama.cpp Q8_0",
        },
    ),
    Headline(
        "mtp",
        "padded b8",
        "time",
        {
            "zh": "解码受限于读权重的 6.9 亿参数，batch 8：投机 / 普通",
            "en": "Decoding bound by reading weights, 0.69 B, batch 8: speculative / plain",
        },
    ),
)
_TABLE = {
    "zh": ("量的是什么（时间或内存之比，越小越好）", "中位数（最小–最大）", "重复", "（", "）"),
    "en": ("What (ratio of time or memory, lower is better)", "median (min–max)", "repeat", " (", ")"),
}
_MARK = re.compile(r"(<!-- python -m perf pages -->\n).*?(<!-- end -->)", re.DOTALL)


def texts(runs: Sequence[Run]) -> dict[Path, str]:
    """每一页、每一张图的路径与全文；README 与大模型一页只换两个记号之间的。"""
    found = newest(list(runs))
    between = {path: headline_table(found, language) for language, path in READMES.items()}
    between[LARGE] = large_tables(found)
    marked = {path: _between(path, content) for path, content in between.items()}
    drawn = {
        PICTURES / f"{name}.svg": picture.standalone()
        for run in found
        for suite in run.suites
        for name, picture in figures.draw(suite).items()
    }
    return {PAGE: page(found), VALIDATION_FILE: validation(found)} | marked | drawn


def _between(path: Path, content: str) -> str:
    """``path`` 的全文，两个记号之间换成 ``content``。"""
    return _MARK.sub(lambda mark: mark[1] + content + mark[2], path.read_text(encoding="utf-8"))


def large_tables(runs: Sequence[Run]) -> str:
    """完整尺寸的导出与切分（套件 ``scale``）：用时与内存，各个 stage 的大小；没有量过就一句话。"""
    lines: list[str] = []
    for run in runs:
        for suite in (one for one in run.suites if one.suite == "scale"):
            rows = [["", "用时", "内存峰值"]]
            for case in suite.cases:
                spent = {
                    key.rpartition(".")[2]: labels.measured(key, one) for key, one in case.values.items()
                }
                if not case.name.startswith("打包"):
                    rows.append([case.name, spent["seconds"], spent["peak"]])
            lines += [*report.table_lines(rows), ""]
            for facts in (case.facts for case in suite.cases if "stage_bytes" in case.facts):
                stages = [
                    [name, str(facts["stage_layers"][name]), size(nbytes)]
                    for name, nbytes in facts["stage_bytes"].items()
                ]
                lines += [*report.table_lines([["stage", "层", "权重，按图里的 dtype"], *stages]), ""]
            lines += [f"{_machine(run, 'zh')}。`python -m perf run scale`。"]
    return "\n".join(lines or ["没有量过：`python -m perf run scale`。"]) + "\n"


def validation(runs: Sequence[Run]) -> str:
    """``dsx plan`` 带着的那一份：流水线的模拟与测量差多少；``runs`` 是 :func:`~perf.results.newest` 给出的。"""
    found = Validation()
    for run in runs:
        for suite in run.suites:
            if suite.suite == "cluster-model":
                errors = {case.name: case.ratios["预测/量到"] for case in suite.cases}
                found = Validation(
                    measured=run.started[:10],
                    machine=f"{run.environment['cpu']['model']}，{run.environment['cpu']['cores']} 核",
                    errors=[
                        ModelError(case=name, median=one.median, low=one.low, high=one.high)
                        for name, one in errors.items()
                    ],
                )
    return found.model_dump_json(indent=1) + "\n"


def headline_table(runs: Sequence[Run], language: str) -> str:
    """三个数字的表，与它们的机器、日期；``runs`` 是 :func:`~perf.results.newest` 给出的。"""
    found = {suite.suite: (run, suite) for run in runs for suite in run.suites}
    what, median, again, left, right = _TABLE[language]
    rows = [[what, median, again]]
    machines: dict[str, list[str]] = {}
    for line in HEADLINES:
        run, suite = found[line.suite]
        case = next(case for case in suite.cases if case.name == line.case)
        value = labels.share(case.ratios[line.ratio]).replace("（", left).replace("）", right)
        rows.append([line.words[language], value, f"`python -m perf run {line.suite}`"])
        machines.setdefault(_machine(run, language), []).append(line.suite)
    return "\n".join([*report.table_lines(rows), "", _machines(machines, language)]) + "\n"


def _machines(machines: Mapping[str, list[str]], language: str) -> str:
    """一行：在哪里量的；不止一处的，各是哪几套。"""
    comma, colon, semicolon, stop = ("、", "：", "；", "。") if language == "zh" else (", ", ": ", "; ", ".")
    if len(machines) == 1:
        return next(iter(machines)) + stop
    return semicolon.join(f"{comma.join(suites)}{colon}{where}" for where, suites in machines.items()) + stop


def _machine(run: Run, language: str) -> str:
    cpu, gpus = run.environment["cpu"], [gpu["name"] for gpu in run.environment["gpus"]]
    if language == "zh":
        return f"{cpu['model']}，{cpu['cores']} 核，{'、'.join(gpus) or '没有 GPU'}，{run.started[:10]}"
    return f"{cpu['model']}, {cpu['cores']} cores, {', '.join(gpus) or 'no GPU'}, {run.started[:10]}"


def page(runs: Sequence[Run]) -> str:
    """``docs/performance.md``；``runs`` 是 :func:`~perf.results.newest` 给出的。"""
    common, sections = report.sections(runs)
    lines = [_HEAD.format(legend=report.LEGEND).rstrip("\n")]
    for section in sections:
        name = section.suite.suite
        environment = dict([*common, *section.environment])
        lines += ["", f"## {section.suite.title}", ""]
        lines += [f"{environment['CPU']}，{environment['时刻'][:10]}。场景：{section.scenario}。"]
        if name in _WORDS:
            lines += [f"来历见 [{Path(_WORDS[name]).name}]({_WORDS[name]})。"]
        if pictures := figures.draw(section.suite):
            lines += ["", *(f"![{picture.title}](perf/{file}.svg)" for file, picture in pictures.items())]
        for table in section.tables:
            lines += [
                "",
                '<div class="numbers" markdown>',
                "",
                *report.table_lines(_narrow(table)),
                "",
                "</div>",
            ]
        lines += ["", "<details markdown><summary>环境与其余的数</summary>", ""]
        lines += [*(f"- {key}：{value}" for key, value in environment.items())]
        lines += [*report.fact_lines(section), "", "</details>"]
    lines += ["", "## 门槛", "", "写在 `perf/gates.toml`；编号是 `specs/` 里的承诺。", ""]
    lines += [f"- {report.verdict_line(verdict)}" for run in runs for verdict in _verdicts(run)]
    return "\n".join(lines) + "\n"


def _verdicts(run: Run) -> list[gates.Verdict]:
    """这一次的结论；从前的结果一套分成几行，别的行里的格子不看。"""
    limits = gates.load_gates()
    cases = [case.name for suite in run.suites for case in suite.cases]
    here = [gate for gate in limits.gates if any(name.startswith(gate.case or "") for name in cases)]
    return gates.check([run], limits.model_copy(update={"gates": here}))


def _narrow(table: list[list[str]]) -> list[list[str]]:
    """格子比量多就转过来：一格一行，页面往下长，不往右长。"""
    return [list(row) for row in zip(*table, strict=True)] if len(table[0]) > len(table) else table
