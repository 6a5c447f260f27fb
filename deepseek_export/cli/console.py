"""往终端写东西：表格、JSON、带单位的数。"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deepseek_export.units import size

_LOG_WIDTH = 120


def console(stream: TextIO | None = None) -> Console:
    """写到 ``stream``（缺省 stdout）的 Console；不是终端时固定 120 列，表格不在日志里折断。"""
    stream = stream or sys.stdout
    width = None if stream.isatty() else _LOG_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """统一样式的表。

    Args:
        title: 表名。
        *columns: 列名。
        right: 右对齐的列。
    """
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    right = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """两列的「名目：值」，没有表头。"""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=True
    )
    made.add_column(no_wrap=True, style="dim")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


def echo_json(data: Any) -> None:
    """一行 JSON。"""
    click.echo(json.dumps(data, ensure_ascii=False))


def weights_size(count: int, mode: str) -> str:
    """权重有多大；不在 bundle 自己的文件里就注明。"""
    return size(count) + ("，按引用，加载时从检查点生成" if mode == "reference" else "")
