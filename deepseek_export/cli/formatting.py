"""帮助文本的排版：click 按字符数折行，汉字占两列会折错，这里按显示宽度折。"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.cells import cell_len

_HEADINGS = {"Options": "选项", "Commands": "命令"}
_WIDE = "\u2e80-\ufaff\uff00-\uffef\u3000-\u303f"
# 折行的最小单位：一段西文，或一个汉字，连同其前不能出现在行尾、其后不能出现在行首的标点。
_UNIT = re.compile(rf"[（「《“]*(?:[^\s{_WIDE}]+|[{_WIDE}])[，。；：、）」》”！？]*|\s+")
_MAX_FIRST_COLUMN = 34
# click 写在选项说明末尾的方括号里的：缺省值、取值范围、必填。
_EXTRA = re.compile(r"  \[([^\]]*)\]$")


def wrap(text: str, width: int) -> list[str]:
    """按显示宽度折行；一个单位放不下一整行时单独成行，不切断。"""
    lines, line = [], ""
    for unit in _UNIT.findall(text):
        if line and cell_len(line) + cell_len(unit.rstrip()) > width:
            lines.append(line.rstrip())
            line = unit.lstrip()
        else:
            line += unit if line else unit.lstrip()
    if line.strip():
        lines.append(line.rstrip())
    return lines or [""]


def units(text: str) -> list[str]:
    """折行时不切断的最小单位，去掉空白。"""
    return [unit for unit in map(str.strip, _UNIT.findall(text)) if unit]


def join(lines: Sequence[str]) -> str:
    """接起 docstring 里断开的行：汉字之间、标点旁边不补空格，其余补一个。"""
    text = ""
    for line in lines:
        ends = text[-1:] + line[:1]
        tight = not ends.isascii() and (re.search(r"[，。；：、（）「」《》]", ends) or cell_len(ends) == 4)
        text += line if tight or not text else f" {line}"
    return text


def described(text: str) -> str:
    """选项说明末尾由 click 补的方括号，写成中文。"""
    return _EXTRA.sub(
        lambda found: "  [" + found[1].replace("default: ", "缺省 ").replace("required", "必填") + "]", text
    )


class HelpFormatter(click.HelpFormatter):
    """中文标题、按显示宽度折行的排版器。"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """用法行。"""
        super().write_usage(prog, args, "用法：")

    def write_heading(self, heading: str) -> None:
        """小标题。"""
        self.write(f"{'':>{self.current_indent}}{_HEADINGS.get(heading, heading)}：\n")

    def write_text(self, text: str) -> None:
        """正文；以 ``\\b`` 开头的段落原样输出。"""
        indent = " " * self.current_indent
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.strip("\n").splitlines()
            if lines and lines[0].strip() == "\b":
                body = lines[1:]
            else:
                body = wrap(join([line.strip() for line in lines]), self.width - len(indent))
            paragraphs.append("\n".join(indent + line for line in body))
        self.write("\n\n".join(paragraphs) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """两列的定义表。"""
        rows = list(rows)
        first = min(max(cell_len(term) for term, _ in rows), _MAX_FIRST_COLUMN) + col_spacing
        indent = " " * self.current_indent
        for term, text in rows:
            lines = wrap(described(text), self.width - len(indent) - first)
            if cell_len(term) + col_spacing > first:
                self.write(f"{indent}{term}\n")
            else:
                self.write(f"{indent}{term}{' ' * (first - cell_len(term))}{lines.pop(0)}\n")
            for line in lines:
                self.write(f"{indent}{' ' * first}{line}\n")


class Context(click.Context):
    """用 :class:`HelpFormatter` 的上下文。"""

    formatter_class = HelpFormatter


def _chinese_help(option: click.Option | None) -> click.Option | None:
    if option is not None:
        option.help = "显示帮助并退出。"
    return option


class Command(click.Command):
    """帮助按中文排版的命令。"""

    context_class = Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """解析参数；用法不对的错误都带着是哪个命令，click 有几种不带。"""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """``-h`` / ``--help``。"""
        return _chinese_help(super().get_help_option(ctx))


class Group(click.Group):
    """帮助按中文排版的命令组。"""

    context_class = Context

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """``-h`` / ``--help``。"""
        return _chinese_help(super().get_help_option(ctx))
