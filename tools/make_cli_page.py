"""重新生成 docs/cli.md：每个命令的用法、说明与选项，取自 click，tests/unit/test_docs_pages.py 核对。

python -m tools.make_cli_page
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from deepseek_export.cli.formatting import described, join
from deepseek_export.cli.main import COMMANDS, cli

PAGE = Path(__file__).resolve().parent.parent / "docs/cli.md"

_HEAD = """\
# 命令行

由各命令自己的帮助生成（`python -m tools.make_cli_page`），不要手改；终端里看 `dsx 命令 --help`。

退出码：0 成功；1 用户能解决的错误，或校验不过；2 用法不对；130 是 Ctrl-C；143 是 SIGTERM。"""


def page() -> str:
    """全文。"""
    with cli.context_class(cli, info_name="dsx", **cli.context_settings) as parent:
        lines = [line for name in COMMANDS for line in _command(parent, name)]
    return "\n".join([_HEAD, *lines]) + "\n"


def _command(parent: click.Context, name: str) -> Iterator[str]:
    command = cli.get_command(parent, name)
    assert command is not None
    with command.context_class(command, info_name=name, parent=parent) as ctx:
        usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
        yield from ("", f"## dsx {name}", "", f"{command.get_short_help_str(limit=200)}。", "")
        yield from ("```text", usage, "```")
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
            yield from ("", *_paragraph(paragraph))
        yield ""
        for param in command.params:
            names, words = param.get_help_record(ctx) or ("", "")
            if words:  # 位置参数只在用法与说明里
                yield f"- `{names}`：{_text(described(words))}"
        # click 把帮助选项存在命令上，名字取自头一次用它的上下文；这里的名字照这一次的。
        shown = command.get_help_option(ctx)
        if shown is not None and shown.help:
            yield f"- `{', '.join(ctx.help_option_names)}`：{_text(shown.help)}"


def _paragraph(text: str) -> list[str]:
    """以 ``\\b`` 开头的原样输出，其余接成一段，同终端里的帮助。"""
    lines = text.splitlines()
    if lines[0] == "\b":
        return ["```text", *lines[1:], "```"]
    return [_text(join([line.strip() for line in lines]))]


def _text(words: str) -> str:
    """不让 Markdown 把帮助里的记号当成格式。"""
    return re.sub(r"([*_\[])", r"\\\1", words).replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
