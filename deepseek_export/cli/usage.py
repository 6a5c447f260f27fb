"""命令行用法不对时的话：click 的是英文，这里换成中文的三行，码是 ``DSX-E700``。"""

from __future__ import annotations

import re

import click

from deepseek_export.errors import DsxError, did_you_mean

#: click 的说法 → 中文；``\1`` 起是其中的值。没有列出的原样留着。
_MESSAGES = (
    (r"'?(.*?)'? is not one of (.*)\.", r"\1 不在可选的值里：\2"),
    (r"'?(.*?)'? is not a valid (?:integer|float)(?: range)?\.", r"\1 不是数"),
    (r"'?(.*?)'? is not a valid boolean\..*", r"\1 不是 true / false"),
    (r"(.*) is not in the range (.*)\.", r"\1 不在 \2 之内"),
    (r"(?:File|Path|Directory) '(.*)' does not exist\.", r"\1 不存在"),
    (r"(?:File|Path) '(.*)' is a directory\.", r"\1 是目录，要的是文件"),
    (r"(?:Directory|Path) '(.*)' is a file\.", r"\1 是文件，要的是目录"),
    (r"(?:File|Path|Directory) '(.*)' is not (?:readable|writable)\.", r"\1 没有权限"),
    (r"No such command '(.*)'\.", r"没有命令 \1"),
    (r"Missing command\.", "缺少命令"),
    (r"Got unexpected extra arguments? \((.*)\)", r"多余的参数：\1"),
    (r"Option '(.*)' does not take a value\.", r"选项 \1 不带值"),
    (r"Option '(.*)' requires (?:an argument|\d+ arguments)\.", r"选项 \1 后面要有值"),
)


def usage_error(error: click.UsageError) -> DsxError:
    """click 的用法错误 → ``DSX-E700``。"""
    command = error.ctx.command_path if error.ctx is not None else "dsx"
    return DsxError("DSX-E700", _what(error), f"{_near(error)}{command} --help 有全部用法")


def _near(error: click.UsageError) -> str:
    """写错的命令、选项的值，最像的是哪一个。"""
    group = error.ctx.command if error.ctx is not None else None
    if isinstance(group, click.Group) and (found := re.fullmatch(r"No such command '(.*)'\.", error.message)):
        return did_you_mean(found[1], group.list_commands(error.ctx))  # type: ignore[arg-type]
    kind = getattr(getattr(error, "param", None), "type", None)
    if isinstance(kind, click.Choice) and (found := re.match(r"'(.*)' is not one of ", error.message)):
        return did_you_mean(found[1], map(str, kind.choices))
    return ""


def _what(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption):
        near = "、".join(error.possibilities or ())
        return f"没有选项 {error.option_name}" + (f"，是不是 {near}" if near else "")
    hint = _hint(error)
    if isinstance(error, click.MissingParameter):
        return f"缺少{'参数' if isinstance(error.param, click.Argument) else '选项'} {hint}"
    message = _translated(error.message)
    return f"{hint}：{message}" if hint else message


def _hint(error: click.UsageError) -> str:
    """出错的是哪个参数：选项写全称，参数写用法里的名字。"""
    param = getattr(error, "param", None)
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return str(param.metavar or param.human_readable_name) if isinstance(param, click.Argument) else ""


def _translated(message: str) -> str:
    for pattern, chinese in _MESSAGES:
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return found.expand(chinese)
    return message
