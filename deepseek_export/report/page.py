"""一页报告：几节，每节有话、图、表；渲染成一个自包含的 HTML 文件。

页里没有脚本，也不取外面的东西（``Content-Security-Policy`` 就这样写）。表里的数放在 ``<data value>`` 里：看的是三位有效数字，
``value`` 是 JSON 报告里原来的数。
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from deepseek_export.report.svg import Picture, clean
from deepseek_export.units import size
from deepseek_export.version import __version__

#: 写在每一页开头：是 dsx 写的页才会被替换。
GENERATOR = '<meta name="generator" content="dsx'


@dataclass(frozen=True)
class Number:
    """表里的一个数。

    Attributes:
        value: JSON 报告里原来的；没有量的是 ``None``。
        shown: 给人看的。
    """

    kind: ClassVar[str] = "number"
    value: float | int | None
    shown: str

    @property
    def exact(self) -> str:
        """``value`` 属性里写的，同 JSON。"""
        return json.dumps(self.value)


@dataclass(frozen=True)
class Code:
    """标识符、路径、命令：等宽，窄处可以断开。"""

    kind: ClassVar[str] = "code"
    shown: str


@dataclass(frozen=True)
class Verdict:
    """通过与否；不只靠颜色。"""

    kind: ClassVar[str] = "verdict"
    passed: bool
    shown: str


Cell = str | Number | Code | Verdict


@dataclass(frozen=True)
class Table:
    """一张表；每一行的第一格是行名。

    Attributes:
        caption: 表名。
        columns: 列名。
        rows: 各行，长度同 ``columns``。
        failed: 不通过的是第几行。
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    failed: frozenset[int] = frozenset()

    @property
    def numeric(self) -> list[bool]:
        """哪几列全是数：列名也靠右。"""
        return [
            bool(cells) and all(isinstance(cell, Number) for cell in cells)
            for cells in zip(*self.rows, strict=True)
        ]


@dataclass(frozen=True)
class Section:
    """一节。

    Attributes:
        title: 节名。
        lead: 节名下面的几句话。
        facts: 名目与内容。
        pictures: 图，宽处并排。
        tables: 表，在图的旁边或下面。
        notes: 末尾的几条。
    """

    title: str
    lead: Sequence[str] = ()
    facts: Sequence[tuple[str, Cell]] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """一页。

    Attributes:
        title: 页名。
        verdict: 页名旁的结论；没有结论的页是 ``None``。
        facts: 页首的名目与内容。
        sections: 各节。
    """

    title: str
    verdict: Verdict | None
    facts: Sequence[tuple[str, Cell]]
    sections: Sequence[Section] = field(default=())


def render(page: Page) -> str:
    """HTML 全文。"""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return clean(template.render(page=page, version=__version__, generator=GENERATOR))


def scientific(value: float | None) -> Number:
    """误差：三位有效数字的科学记数。"""
    return Number(value, "-" if value is None else f"{value:.2e}")


def integer(value: int) -> Number:
    """个数，千分节。"""
    return Number(value, f"{value:,}")


def nbytes(value: int | None) -> Number:
    """字节数，带单位。"""
    return Number(value, "未知" if value is None else size(value))
