"""往终端写东西：表格、JSON、带单位的数。"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import click
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deepseek_export.cli.formatting import wrap
from deepseek_export.units import size

_LOG_WIDTH = 120


def console(stream: TextIO | None = None) -> Console:
    """写到 ``stream``（缺省 stdout）的 Console；不是终端时固定 120 列，表格不在日志里折断。"""
    stream = stream or sys.stdout
    width = None if stream.isatty() else _LOG_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class _Cell:
    """单元格里的文字：按显示宽度折行，张量名不从中间断开，一行放不下才在点、斜杠之后断。"""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = [piece for line in wrap(self._text, width) for piece in _pieces(line, width)]
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, cell_len(self._text))


def _pieces(line: str, width: int) -> Iterator[str]:
    while cell_len(line) > width and (cut := max(line.rfind(mark, 0, width) for mark in "./") + 1):
        yield line[:cut]
        line = line[cut:]
    yield line


class _Table(Table):
    """单元格按 :class:`_Cell` 折行的表。"""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """文字之外的单元格原样。"""
        super().add_row(*(_Cell(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """统一样式的表。

    Args:
        title: 表名。
        *columns: 列名。
        right: 右对齐的列。
    """
    made = _Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    right = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """两列的「名目：值」，没有表头。"""
    made = _Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=True
    )
    made.add_column(no_wrap=True, style="dim")
    made.add_column()
    for name, value in rows:
        made.add_row(name, value)
    return made


def echo_json(data: Any) -> None:
    """一行 JSON。"""
    click.echo(json.dumps(data, ensure_ascii=False))


def weights_size(count: int, mode: str) -> str:
    """权重有多大；不在 bundle 自己的文件里就注明。"""
    return size(count) + ("，按引用，加载时从检查点生成" if mode == "reference" else "")
