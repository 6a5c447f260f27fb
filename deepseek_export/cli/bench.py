"""``dsx bench``。"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, facts, table, write_html
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    bundle_argument,
    counts,
    html_option,
    json_option,
    read_prompts,
    threads_option,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.errors import UnwrittenReport
from deepseek_export.report.bench import bench_page, ratio_name, way_name
from deepseek_export.units import gigabytes, size

if TYPE_CHECKING:
    from rich.table import Table

    from deepseek_export.benchmark.bundle import BenchReport
    from deepseek_export.benchmark.spread import Spread

_COUNT = counts()


@click.command("bench", cls=Command, short_help="在这台机器上测 bundle 的速度与内存")
@bundle_argument
@click.option(
    "--against",
    metavar="OUT2",
    type=click.Path(path_type=Path),
    help="同一个检查点的另一个 bundle，交替地测。",
)
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="一批几条。")
@click.option("--prompt-len", type=_COUNT, default=256, show_default=True, help="随机提示词的长度。")
@click.option(
    "-P",
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    callback=read_prompts,
    help="用文本代替随机的提示词，可重复；- 与 @FILE 同 dsx generate。",
)
@click.option("--new-tokens", type=counts(2), default=64, show_default=True, help="每条生成多少个 token。")
@click.option(
    "--depth",
    "depths",
    type=_COUNT,
    multiple=True,
    help="在这个上下文长度上测一步，可重复；缺省 256、1024、4096、8192 里模型放得下的。",
)
@click.option("--runs", type=_COUNT, default=5, show_default=True, help="每种跑几遍，另有一遍预热。")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="随机种子。")
@threads_option
@verify_weights_option(None)
@html_option
@json_option
def command(
    bundle: Path,
    against: Path | None,
    prompts: tuple[str, ...],
    verify_weights: bool | None,
    html: Path | None,
    as_json: bool,
    **scenario: Any,
) -> None:
    """测 bundle OUT：prefill、解码、各上下文长度的一步，以及进程的内存。

    每个数是几遍的中位数与范围；要比的几种跑法在同一次运行里交替进行，机器变快变慢时一起变。内存是单独的进程实测的，与按形状算的缓存大小并列。
    每个上下文另给出一步至少要读的字节（权重，专家只算命中的；看得见的缓存）、每秒读了多少，占这台机器当场测得的读速的几成：离 100% 还差的是能省的。
    带 MTP 的 bundle 同时测投机解码，接受率要用 -P 给真的文本才有意义。结果写进 OUT/reports/bench.json。

    \b
    例：
      dsx bench OUT
      dsx bench OUT --against BASELINE --depth 1024 --depth 8192 --threads 2
      dsx bench SPEC -P "床前明月光" --batch 8
    """
    try:
        with open_progress(as_json) as progress:
            progress.start("加载 onnxruntime")
            from deepseek_export.benchmark.bundle import bench

            report = bench(
                bundle,
                against,
                prompts=prompts or None,
                verify_weights=verify_weights,
                progress=progress,
                **scenario,
            )
    except UnwrittenReport as unwritten:
        _show(unwritten.report, as_json)
        write_html(html, as_json, bench_page, unwritten.report)
        raise
    _show(report, as_json)
    if not as_json:
        click.echo(f"\n报告    {bundle / 'reports/bench.json'}")
    write_html(html, as_json, bench_page, report)


def _show(report: BenchReport, as_json: bool) -> None:
    if as_json:
        echo_json(report.model_dump(mode="json"))
    else:
        _print(report)


def _print(report: BenchReport) -> None:
    out = console()
    cpu, scenario = report.environment["cpu"], report.scenario
    out.print(
        facts(
            f"{report.subjects['bundle'].path}：batch {scenario.batch}，{scenario.runs} 遍",
            [
                (
                    "机器",
                    f"{cpu['model'] or cpu['machine']}，{cpu['cores']} 核，线程 {scenario.threads or '自动'}",
                ),
                *(
                    (way_name(name), f"{s.path}（{s.profile}，{s.target}，{s.dtype}）")
                    for name, s in report.subjects.items()
                ),
            ],
        )
    )
    made = table(
        "生成", "跑法", "prefill", "每个 token", "token/s", right=("prefill", "每个 token", "token/s")
    )
    for name, way in report.ways.items():
        rate = f"{1 / way.token_s.median:.1f}"
        made.add_row(way_name(name), _milliseconds(way.prefill_s), _milliseconds(way.token_s), rate)
    out.print(made)
    made = table("一步", "上下文", *map(way_name, report.subjects), right=map(way_name, report.subjects))
    for depth in report.depths:
        made.add_row(str(depth.context), *(_milliseconds(depth.step_s[name]) for name in report.subjects))
    out.print(made)
    out.print(_reads(report))
    columns = ("算出的缓存", "实测的缓存", "加载后", "解码时", "峰值")
    made = table(f"内存（上下文 {max(scenario.depths)}）", "", *columns, right=columns)
    for name, subject in report.subjects.items():
        if subject.memory is None:
            made.add_row(way_name(name), *["未知"] * len(columns))
            continue
        m = subject.memory
        values = (m.cache_computed, m.cache_resident, m.loaded, m.resident, m.peak)
        made.add_row(way_name(name), *map(size, values))
    out.print(made)
    if report.ratios:
        made = table("比值（小于 1 是前者快）", "", "中位数", "范围", right=("中位数", "范围"))
        for ratio in report.ratios:
            value = ratio.value
            name = ratio_name(ratio.what, ratio.numerator, ratio.denominator)
            made.add_row(name, f"{value.median:.3f}", f"{value.low:.3f}–{value.high:.3f}")
        out.print(made)
    for name, way in report.ways.items():
        for line in way.notes:
            click.echo(f"注意：{way_name(name)}：{line}")


def _reads(report: BenchReport) -> Table:
    """一步至少要读的字节，除以一步的时间，对这台机器读得动的。"""
    columns = ("权重", "缓存", "每秒读", "机器读得动", "占")
    made = table("一步读多少", "上下文", "", *columns, right=columns)
    for depth in report.depths:
        machine = depth.machine_bytes_per_second
        for name, read in depth.reads.items():
            made.add_row(
                str(depth.context),
                way_name(name),
                size(read.weight_bytes),
                size(read.cache_bytes),
                gigabytes(read.bytes_per_second.median),
                "不知道" if machine is None else gigabytes(machine.median),
                "-" if read.share is None else f"{read.share.median:.0%}",
            )
    return made


def _milliseconds(spread: Spread) -> str:
    return f"{spread.median * 1e3:.2f} ms（{spread.low * 1e3:.2f}–{spread.high * 1e3:.2f}）"
