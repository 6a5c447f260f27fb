"""进度的三种显示：终端里的进度条、日志里的逐行文本、``--json`` 时不显示。都写到 stderr。"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

import click
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichBars
from rich.table import Column
from rich.text import Text

from deepseek_export.cli.console import console
from deepseek_export.progress import Progress, Unit
from deepseek_export.units import size


class CliProgress(Progress):
    """命令行的进度；也是上下文管理器。基类只显示 ``note``。"""

    def __enter__(self) -> CliProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind is None)

    def close(self, succeeded: bool) -> None:
        """全部结束。"""

    def note(self, line: str) -> None:
        """``注意：……``。"""
        click.echo(f"注意：{line}", err=True)


#: 没有终端时，一个阶段里每隔这么久说一声做到哪里。
EVERY_SECONDS = 5.0


class PlainProgress(CliProgress):
    """每个阶段一行，开头是从启动算起的秒数；做得久的每隔几秒再一行。

    Args:
        every: 隔几秒；由自己的线程看着，阶段里不报进度的长活（建引擎、加载模型）也不会一声不响。
    """

    def __init__(self, every: float | None = None) -> None:
        self._every = EVERY_SECONDS if every is None else every
        self._began = self._said = time.perf_counter()
        self._stage, self._total, self._done, self._detail = "", 0, 0, ""
        self._unit: Unit = "items"
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._repeat, name="dsx-progress", daemon=True)
        self._watch.start()

    def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
        """进入阶段时打印，卡住也看得出卡在哪。"""
        self._stage, self._total, self._unit, self._done, self._detail = stage, total or 0, unit, 0, ""
        self._say(f"{stage}（{size(total)}）" if total is not None and unit == "bytes" else stage)

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """只记下；到时候由线程打印。"""
        self._done, self._detail = self._done + amount, detail

    def close(self, succeeded: bool) -> None:
        """最后一行：总用时。"""
        self._closed.set()
        self._watch.join()
        self._say("完成" if succeeded else "中止")

    def _repeat(self) -> None:
        while not self._closed.wait(max(self._said + self._every - time.perf_counter(), 0.01)):
            if self._stage and time.perf_counter() >= self._said + self._every:
                try:
                    self._say(self._now())
                except Exception:
                    return  # stderr 写不了：主线程下一次写的时候会按码报

    def _now(self) -> str:
        amounts = [str(self._done), str(self._total)]
        if self._unit == "bytes":
            amounts = [size(self._done), size(self._total)]
        line = self._stage + (f"：{' / '.join(amounts)}" if self._total else "……")
        return f"{line}（{self._detail}）" if self._detail else line

    def _say(self, line: str) -> None:
        self._said = time.perf_counter()
        click.echo(f"[{self._said - self._began:6.1f} s] {line}", err=True)


class _Amount(ProgressColumn):
    """``12.3 MiB / 45.0 MiB`` 或 ``3 / 6``；总量未知时空着。"""

    def render(self, task: Task) -> Text:
        if task.fields["total_known"] is None or task.finished:
            return Text("")
        done, total = int(task.completed), int(task.total or 0)
        in_bytes = task.fields["unit"] == "bytes"
        return Text(f"{size(done)} / {size(total)}" if in_bytes else f"{done} / {total}")


class _Seconds(ProgressColumn):
    """已用秒数。"""

    def render(self, task: Task) -> Text:
        return Text(f"{task.elapsed or 0:.1f} s", style="dim")


class _WhileRunning(BarColumn):
    """只给正在进行、总量已知的阶段画条。"""

    def render(self, task: Task) -> Any:
        return Text("") if task.finished or task.fields["total_known"] is None else super().render(task)


class RichProgress(CliProgress):
    """终端进度：做完的阶段留一行用时，正在做的显示进度条与正在处理的东西。"""

    def __init__(self) -> None:
        self._bars = RichBars(
            SpinnerColumn(finished_text=Text("✓", style="green")),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            _Seconds(table_column=Column(justify="right", no_wrap=True)),
            _WhileRunning(bar_width=24),
            _Amount(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[detail]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console(sys.stderr),
            expand=True,
        )
        self._task: TaskID | None = None
        self._bars.start()

    def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
        """结束上一个阶段，开始这一个。"""
        self._finish()
        known = total or None
        self._task = self._bars.add_task(stage, total=known, total_known=known, unit=unit, detail="")

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """前进。"""
        if self._task is not None:
            self._bars.update(self._task, advance=amount, detail=detail)

    def note(self, line: str) -> None:
        """印在进度条上方。"""
        self._bars.console.print(Text.assemble(("注意：", "yellow"), line))

    def close(self, succeeded: bool) -> None:
        """停下刷新；没做完的阶段标「中止」。"""
        if succeeded:
            self._finish()
        elif self._task is not None:
            self._bars.stop_task(self._task)
            stage = self._bars.tasks[-1].description
            self._bars.update(self._task, description=f"{stage}：中止", detail="")
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[-1].total or 1
            self._bars.update(self._task, total=done, completed=done, detail="")
            self._bars.stop_task(self._task)


def open_progress(as_json: bool) -> CliProgress:
    """按 stderr 是不是终端选一种显示。"""
    if as_json:
        return CliProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
