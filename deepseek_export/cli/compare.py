"""``dsx compare``。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    against_option,
    bundle_argument,
    html_option,
    json_option,
    seed_option,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.report.measures import COLUMNS, cells, failure_rows, worst
from deepseek_export.report.parity import compare_page

if TYPE_CHECKING:
    from deepseek_export.parity.bisect import Culprit
    from deepseek_export.parity.compare import ComparisonReport

#: 同一段的节点多于这些就只说头尾。
_LISTED = 6


@click.command("compare", cls=Command, short_help="逐块比较，存成 Polygraphy 的格式")
@bundle_argument
@against_option
@click.option(
    "--backend",
    "backends",
    metavar="NAMES",
    default="ort",
    show_default=True,
    help="与 PyTorch 比的后端，逗号分隔；ort 是 ONNX Runtime CPU，trt 是 TensorRT（要有 GPU 与 dsx build 的引擎）。",
)
@click.option(
    "--block",
    "blocks",
    metavar="N",
    multiple=True,
    help="只比这一块：层号、embed、head 或草稿模型的文件名；可重复，缺省全部。",
)
@click.option("--bisect", is_flag=True, help="有块不对时，再找出块里第一个不对的 ONNX 节点。")
@click.option(
    "--save",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="输入与参照存到哪里；缺省 OUT/reports/compare。上一次的结果会被替换。",
)
@seed_option
@verify_weights_option(True)
@html_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    against: Path | None,
    backends: str,
    blocks: tuple[str, ...],
    bisect: bool,
    folder: Path | None,
    seed: int,
    verify_weights: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """逐块比较 bundle OUT 与 PyTorch，把输入与 PyTorch 的输出存成 Polygraphy 的格式。

    每个块的输入都由 PyTorch 喂，上游的错误传不到下游：第一个不对的块就是出错的那一块。末尾打印的 polygraphy run 命令离开 dsx 也能
    重复同一次比较。trt 为断开的图就地建一个引擎，与 dsx build 同一份下沉、同一种 TensorRT。不一致时退出码是 1；--bisect 接着找出第一个不对的节点，并核对它的权重、属性、常量与接线。
    """
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        report = api.compare(
            bundle,
            against,
            backends=[name.strip() for name in backends.split(",")],
            blocks=blocks,
            bisect=bisect,
            folder=folder,
            seed=seed,
            verify_weights=verify_weights,
            progress=progress,
        )
    summary = _summary(report)
    if as_json:
        echo_json(summary)
    else:
        _print(report, summary)
    write_html(html, as_json, compare_page, report)
    ctx.exit(0 if report.passed else 1)


def _summary(report: ComparisonReport) -> dict[str, Any]:
    grouped: dict[tuple[str, str, str], list[Any]] = {}
    for row in report.cases:
        grouped.setdefault((row.graph, row.block, row.backend), []).append(row.case)
    failure = report.first_failure
    return {
        "passed": report.passed,
        "bundle": report.bundle,
        "checkpoint": report.checkpoint,
        "profile": report.profile,
        "target": report.target,
        "dtype": report.dtype,
        "backends": report.backends,
        "blocks": [
            {"graph": graph, "block": block, "backend": backend, **worst(cases)}
            for (graph, block, backend), cases in grouped.items()
        ],
        "first_failure": None if failure is None else failure.model_dump(mode="json"),
        "culprit": None if report.culprit is None else report.culprit.model_dump(mode="json"),
        "folder": report.folder,
        "report": str(Path(report.folder) / "compare.json"),
        "polygraphy": report.commands,
    }


def _print(report: ComparisonReport, summary: dict[str, Any]) -> None:
    out = console()
    made = table(
        f"{report.bundle}（{report.profile}，{report.target}，{report.dtype}）逐块对 PyTorch",
        *("图", "块", "后端", *COLUMNS, "结果"),
        right=COLUMNS,
        optional=(COLUMNS[3], COLUMNS[2]),
    )
    for row in summary["blocks"]:
        verdict = f"{row['failed']} 项不过" if row["failed"] else "通过"
        style = "bold red" if row["failed"] else ""
        made.add_row(row["graph"], row["block"], row["backend"], *cells(row), verdict, style=style)
    out.print(made)
    failure = report.first_failure
    if failure is not None:
        where = [("图", failure.graph), ("块", failure.block), ("后端", failure.backend)]
        where.append(("哪一项", failure.case.name))
        out.print(facts("第一个不对的块", [*where, *failure_rows(failure.case)]))
    if report.culprit is not None:
        out.print()
        out.print(facts("第一个不对的节点", _culprit_rows(report.culprit)))
    click.echo(f"\n结论    {'全部一致' if report.passed else '不一致'}")
    click.echo(f"报告    {summary['report']}")
    for line in report.commands.values():
        click.echo(f"复现    {line}")
    if report.culprit is not None:
        click.echo(f"逐节点  {report.culprit.command}")


def _culprit_rows(culprit: Culprit) -> list[tuple[str, str]]:
    rows = [("比过", f"{culprit.block} ({culprit.phase}) 里的 {culprit.checked} 个值，各自用 PyTorch 的输入")]
    if culprit.case is None:
        together = "每个值单独算都对：毛病在它们合起来的时候，即误差累积，或后端把节点融合之后算错"
        return [*rows, ("节点", together)]
    *others, node = culprit.nodes
    rows += [("节点", f"{node.name}（{node.op}）"), ("输出", culprit.value)]
    if len(others) > _LISTED:
        # 下沉换上的一整段，中间没有 PyTorch 的值可比
        rows.append(("同一段", f"{others[0].name} 到 {others[-1].name}，共 {len(others)} 个节点"))
    else:
        rows += [("同一段", f"{other.name}（{other.op}）") for other in others]
    rows += failure_rows(culprit.case)
    rows += [("原因", cause) for cause in culprit.causes]
    if not culprit.causes:
        rows.append(
            ("原因", "权重、属性、常量、接线都与捕获时相同：是函数体、下沉换上的节点，或后端的 kernel")
        )
    return rows
