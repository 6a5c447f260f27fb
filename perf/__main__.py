"""``python -m perf``：运行场景、对照门槛、写报告。

python -m perf run [SUITE...]      完整的场景，追加进历史，重写报告
python -m perf check               缩小的场景，对照门槛与上一次，不写历史
python -m perf report              只用历史重写报告
python -m perf add DIR             把 python -m perf.gpu.accept 在别的机器上写的目录追加进历史，重写报告
python -m perf compare [SUITE...]  每套最后两次完整的运行：每个比值的散布相不相交
python -m perf pages               由历史重写 docs/performance.md、docs/perf 里的图与两份 README 的三个数字
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import click

from deepseek_export.benchmark.environment import environment
from deepseek_export.cpu_library import find_library
from deepseek_export.errors import DsxError
from deepseek_export.machine import cores
from perf import gates, pages, report, reproduce, results
from perf.results import ROOT, Run
from perf.suites import SUITES
from perf.workload.workspace import workspace

#: 缩小了也要几分钟的（训练），或量的是导出的，不进 ``check`` 的缺省。
QUICK_SUITES = ("mla-memory", "mla-decode", "mtp", "moe")
OUT = ROOT / "build/perf-report"

suite_argument = click.argument("suites", nargs=-1, type=click.Choice(list(SUITES)))
threads_option = click.option("--threads", type=click.IntRange(min=1), default=cores(), show_default=True)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=OUT, help="报告写到这里。"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """性能测量；场景写在各套件里，门槛写在 perf/gates.toml。"""


@cli.command()
@suite_argument
@threads_option
@click.option("--quick", is_flag=True, help="缩小的场景；历史里标明，与完整的不混比。")
@out_option
def run(suites: tuple[str, ...], threads: int, quick: bool, out: Path) -> None:
    """运行 SUITES（缺省全部），追加进历史，重写报告。"""
    for name in suites or tuple(SUITES):
        # 一套一行：后面的失败了，前面量好的已经在历史里。
        results.append(measure((name,), threads, quick))
    _write_latest(out)


@cli.command()
@suite_argument
@threads_option
@click.option("--no-time", is_flag=True, help="时间的门槛只报告不失败（机器不安静时，例如 CI）。")
@out_option
def check(suites: tuple[str, ...], threads: int, no_time: bool, out: Path) -> None:
    """缩小的场景，对照门槛与历史里的上一次；不过时退出码是 1。"""
    found, limits = measure(suites or QUICK_SUITES, threads, quick=True), gates.load_gates()
    verdicts = [*gates.check([found], limits), *gates.regressions(found, results.load(), limits)]
    _write([found], verdicts, out)
    failed = [v for v in verdicts if v.status == "fail" and not (no_time and v.kind == "time")]
    for verdict in verdicts:
        click.echo(report.verdict_line(verdict))
    if failed or found.skipped:
        raise click.ClickException(f"{len(failed)} 条不过，{len(found.skipped)} 套没有跑成")


@cli.command("report")
@out_option
def rewrite(out: Path) -> None:
    """只用历史重写报告。"""
    _write_latest(out)


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@out_option
def add(folder: Path, out: Path) -> None:
    """把目录 DIR（别的机器上 ``python -m perf.gpu.accept`` 写的）追加进历史，重写报告；审计的估计写在测得的旁边。"""
    from perf.gpu import record  # 要 torch 与 triton

    try:
        found = Run.model_validate(record.load(folder))
    except (FileNotFoundError, ValueError, DsxError) as error:
        raise click.ClickException(str(error)) from error
    if not any(case.ratios for suite in found.suites for case in suite.cases):
        raise click.ClickException(f"{folder} 里没有一个核对过的计时，没有记：各步怎样见 {folder}/*.log")
    results.append(found)
    _write_latest(out)


@cli.command()
@suite_argument
def compare(suites: tuple[str, ...]) -> None:
    """SUITES（缺省全部）最后两次完整的运行，每个比值的散布相不相交；有不相交的，或没有两次可比的，退出码是 1。"""
    found = reproduce.compare(suites or tuple(SUITES), results.load())
    for comparison in found:
        click.echo("\n".join(comparison.lines()))
    if failed := [comparison.suite for comparison in found if not comparison.reproduced]:
        raise click.ClickException(f"没有重现：{'、'.join(failed)}")


@cli.command("pages")
def rewrite_pages() -> None:
    """由历史重写 docs/performance.md、docs/perf 里的图、两份 README 的三个数字与 dsx plan 带着的模拟误差。"""
    texts = pages.texts(results.load())
    for stale in set(pages.PICTURES.glob("*.svg")) - set(texts):
        stale.unlink()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        click.echo(str(path))


def measure(suites: tuple[str, ...], threads: int, quick: bool) -> Run:
    """跑几套场景；没装依赖或语料而跑不了的，写明跳过。"""
    started, skipped, found = datetime.now(UTC), [], []
    library = find_library()
    machine = environment(threads, ROOT) | {
        # 不照抄命令行：同一次里的别的套件、报告写到哪里，都与这一行无关。
        "command": shlex.join(["python", "-m", "perf", "run", *(["--quick"] if quick else []), *suites]),
        "cpu_library": None if library is None else library.isa,
    }
    for name in suites:
        click.echo(f"{datetime.now(UTC):%H:%M:%S} {name}", err=True)
        with workspace() as folder:
            try:
                found.append(import_module(SUITES[name]).run(folder, quick, threads))
            except (ImportError, FileNotFoundError) as error:
                skipped.append(f"{name}：{error}")
                click.echo(f"跳过 {name}：{error}", err=True)
    return Run(
        started=started.isoformat(timespec="seconds"),
        quick=quick,
        environment=machine,
        suites=found,
        skipped=skipped,
    )


def _write_latest(out: Path) -> None:
    latest = results.latest(results.load())
    _write(latest, gates.check(latest, gates.load_gates()), out)


def _write(runs: list[Run], verdicts: list[gates.Verdict], out: Path) -> None:
    for path in report.write(runs, verdicts, out):
        click.echo(str(path))


if __name__ == "__main__":
    cli()
