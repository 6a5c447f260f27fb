"""``dsx verify``。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    against_option,
    backend_option,
    bundle_argument,
    counts,
    html_option,
    json_option,
    seed_option,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.errors import UnwrittenReport
from deepseek_export.report.measures import COLUMNS, cells, failure_rows, loss_rows, worst
from deepseek_export.report.parity import MEANINGS, verify_page

if TYPE_CHECKING:
    from deepseek_export.parity.report import ParityReport

LEVELS = ("op", "block", "model", "tokens")


@click.command("verify", cls=Command, short_help="证明 bundle 与 PyTorch 相等")
@bundle_argument
@against_option
@click.option(
    "--level", "levels", type=click.Choice(LEVELS), multiple=True, help="只比这一级，可重复；缺省全部。"
)
@click.option(
    "--prompt", "prompts", metavar="TEXT", multiple=True, help="用这段文本比，可重复；缺省用内置的。"
)
@click.option("--steps", type=counts(), default=64, show_default=True, help="tokens 级续写多少个 token。")
@seed_option
@click.option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="量化的 bundle 在这个文件的文本上比困惑度；float16 的看激活会不会溢出。",
)
@backend_option
@verify_weights_option(True)
@html_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    against: Path | None,
    levels: tuple[Any, ...],
    prompts: tuple[str, ...],
    steps: int,
    seed: int,
    text: Path | None,
    backend: str,
    verify_weights: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """逐级比对 bundle OUT 与 PyTorch：算子、每一层、logits、greedy 续写的 token。

    每一级都看三个量：最大绝对差、calc_diff（余弦型差异）、范数比；容差在 dsx 的容差表里，不能在命令行上放宽。近平局（两个候选几乎
    同分，换一个不算错）单独计数。权重量化过的 bundle，前几级的参照用同样的量化权重，loss 一级再量它比未量化的差多少；缓存比模型窄的同理，参照用同样窄的缓存。float16 的 bundle 先看参考模型的激活：超过 65504 就不通过。全部结果写进 OUT/reports/parity.json；不通过时退出码是 1。
    """
    try:
        with open_progress(as_json) as progress:
            progress.start("加载 torch 与 onnx")
            from deepseek_export import api

            report = api.verify(
                bundle,
                against,
                levels=levels or LEVELS,
                prompts=prompts or None,
                steps=steps,
                seed=seed,
                text=text,
                backend=backend,
                verify_weights=verify_weights,
                progress=progress,
            )
    except UnwrittenReport as unwritten:
        _show(unwritten.report, None, as_json)
        write_html(html, as_json, verify_page, unwritten.report)
        raise
    _show(report, Path(report.bundle) / "reports/parity.json", as_json)
    write_html(html, as_json, verify_page, report)
    ctx.exit(0 if report.passed else 1)


def _show(report: ParityReport, written: Path | None, as_json: bool) -> None:
    summary = _summary(report, written)
    if as_json:
        echo_json(summary)
    else:
        _print(report, summary)


def _summary(report: ParityReport, written: Path | None) -> dict[str, Any]:
    """``--json`` 输出的就是它；``written`` 是报告写在哪里，没有写成为 ``None``。"""
    failure = report.first_failure
    return {
        "passed": report.passed,
        "bundle": report.bundle,
        "checkpoint": report.checkpoint,
        "profile": report.profile,
        "target": report.target,
        "dtype": report.dtype,
        "oracle": report.oracle,
        "levels": [
            {"level": level, **worst([case for case in report.cases if case.level == level])}
            for level in report.levels
        ],
        "first_failure": None if failure is None else failure.model_dump(mode="json"),
        "notes": report.notes,
        "loss": None if report.loss is None else report.loss.model_dump(mode="json"),
        "activations": None if report.activations is None else report.activations.model_dump(mode="json"),
        "report": None if written is None else str(written),
        "polygraphy": report.polygraphy,
    }


def _print(report: ParityReport, summary: dict[str, Any]) -> None:
    out = console()
    numbers = ("项数", *COLUMNS)
    made = table(
        f"{report.bundle}（{report.profile}，{report.target}，{report.dtype}）对 {report.oracle}",
        *("层级", "比什么", *numbers, "结果"),
        right=numbers,
        optional=("比什么", "项数"),
    )
    for row in summary["levels"]:
        failed = f"{row['failed']} 项不过"
        verdict, style = ("没有可比的", "dim") if not row["cases"] else ("通过", "green")
        if row["failed"]:
            verdict, style = failed, "bold red"
        made.add_row(
            row["level"],
            MEANINGS[row["level"]],
            str(row["cases"]),
            *cells(row),
            verdict,
        )
        made.rows[-1].style = style if row["failed"] else ""
    out.print(made)
    for line in report.notes:
        click.echo(f"注意：{line}")
    if report.loss is not None:
        out.print()
        out.print(facts("权重量化的损失（对未量化的基准）", loss_rows(report.loss)))
    if report.activations is not None:
        click.echo(f"激活    {report.activations.sentence}")
    failure = report.first_failure
    if failure is not None:
        where = [("层级", failure.level), ("哪一项", failure.name)]
        out.print(facts("第一处不通过", [*where, *failure_rows(failure)]))
    click.echo(f"\n结论    {'全部通过' if report.passed else '不通过'}")
    if summary["report"] is not None:
        click.echo(f"报告    {summary['report']}")
    if report.polygraphy is not None:
        click.echo(f"复现    {report.polygraphy}")
