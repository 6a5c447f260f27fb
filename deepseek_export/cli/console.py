"""往终端写东西：表格、JSON、带单位的数。"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from deepseek_export.cli.formatting import units, wrap
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.report.page import Page

LOG_WIDTH = 120
#: 名字里可以断开的一段。
_PIECES = re.compile(r"[^./]*[./]|[^./]+")


def console(stream: TextIO | None = None) -> Console:
    """写到 ``stream``（缺省 stdout）的 Console；不是终端时固定 120 列，表格不在日志里折断。"""
    stream = stream or sys.stdout
    width = None if stream.isatty() else LOG_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class _Cell:
    """单元格里的文字：按显示宽度折行，张量名不从中间断开，一行放不下才在点、斜杠之后断。"""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = [piece for line in wrap(self.text, width) for piece in _pieces(line, width)]
        yield Text("\n".join(lines), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, cell_len(self.text))


def _pieces(line: str, width: int) -> Iterator[str]:
    while cell_len(line) > width and (cut := max(line.rfind(mark, 0, width) for mark in "./") + 1):
        yield line[:cut]
        line = line[cut:]
    yield line


class _Lines(Table):
    """单元格按 :class:`_Cell` 折行的表。"""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """文字之外的单元格原样。"""
        super().add_row(*(_Cell(cell) if isinstance(cell, str) else cell for cell in cells), **options)


class _Table(_Lines):
    """按终端的宽度选列：名字、数字放不下整个的，先去掉可有可无的列，还不够才折断。

    Attributes:
        optional: 可有可无的列名，先去掉的在前。
    """

    optional: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, dropped = self.columns, list[str]()
        whole = {id(column): _least(column, broken=False) for column in columns}
        for name in self.optional:
            if sum(whole[id(column)] for column in columns) <= options.max_width - _edges(columns):
                break
            columns = [column for column in columns if column.header != name]
            dropped.append(name)
        chosen = copy(self)
        chosen.columns = _fitted(columns, whole, options.max_width - _edges(columns))
        yield from Table.__rich_console__(chosen, console, options)
        if dropped:
            shown = "、".join(name for name in dropped if name)
            yield Text(f" 太窄，没有列出：{shown}；终端宽一些就有，--json 里也有", style="dim")


def _fitted(columns: Sequence[Column], whole: Mapping[int, int], width: int) -> list[Column]:
    """定好每列多宽：先给够放下整个名字的，剩下的按还缺多少分；连那也不够就都交给 rich 去折。"""
    least = [whole[id(column)] for column in columns]
    if sum(least) > width:
        least = [_least(column, broken=True) for column in columns]
    most = [max(low, _most(column)) for low, column in zip(least, columns, strict=True)]
    spare, wanted = width - sum(least), sum(most) - sum(least)
    widths: list[int | None] = [None] * len(columns)
    if spare >= 0:
        share = min(1.0, spare / wanted) if wanted else 0.0
        widths = [low + int((high - low) * share) for low, high in zip(least, most, strict=True)]
    return [
        replace(column, _index=index, width=width)
        for index, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]


def _edges(columns: Sequence[Column]) -> int:
    """列之外的宽度：每列两边各空一格，列之间一条（看不见的）线。"""
    return 3 * len(columns) - 1


def _texts(column: Column) -> list[str]:
    return [cell.text for cell in column.cells if isinstance(cell, _Cell)]


def _most(column: Column) -> int:
    lines = [line for text in (str(column.header), *_texts(column)) for line in text.splitlines()]
    return max(map(cell_len, lines), default=1)


def _least(column: Column, broken: bool) -> int:
    """至少多宽：列名与右对齐的数不折，其余放得下最长的一个单位；``broken`` 时都只要放得下点、斜杠之间的一段。"""
    texts = [*_texts(column), str(column.header)]
    if broken:
        pieces = [piece for text in texts for unit in units(text) for piece in _PIECES.findall(unit)]
        return max(map(cell_len, pieces), default=1)
    if column.justify == "right":
        return _most(column)
    found = [unit for text in texts[:-1] for unit in units(text)]
    return max(map(cell_len, (*found, texts[-1])), default=1)


def table(title: str, *columns: str, right: Iterable[str] = (), optional: Iterable[str] = ()) -> Table:
    """统一样式的表。

    Args:
        title: 表名。
        *columns: 列名。
        right: 右对齐的列。
        optional: 放不下时可以不列的，先去掉的在前。
    """
    made = _Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    made.optional = tuple(optional)
    right = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """两列的「名目：值」，没有表头。"""
    made = _Lines(
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


def write_html(path: Path | None, as_json: bool, page: Callable[..., Page], *results: Any) -> None:
    """给了 ``--html`` 就写那一页；总在结果印完之后，写不下也不丢结果。

    Args:
        path: 写到哪里；``None`` 不写。
        as_json: stdout 的最后一行已经是 JSON，不再多说。
        page: 由 ``results`` 排出那一页。
        *results: 算出来的结果。

    Raises:
        DsxError: 见 :func:`~deepseek_export.report.write.write_page`。
    """
    if path is None:
        return
    from deepseek_export.report.write import write_page

    write_page(path, page(*results))
    if not as_json:
        click.echo(f"网页    {path}")


def weights_size(count: int, mode: str) -> str:
    """权重有多大；不在 bundle 自己的文件里就注明。"""
    return size(count) + ("，按引用，加载时从检查点生成" if mode == "reference" else "")
