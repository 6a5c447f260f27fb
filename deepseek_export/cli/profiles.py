"""``dsx profiles``。"""

from __future__ import annotations

import click

from deepseek_export.cli.console import console, table
from deepseek_export.cli.formatting import Command, Group
from deepseek_export.cli.options import set_option
from deepseek_export.profile import BUILTIN_PROFILES, resolve_profile

_EFFECTS = {
    "baseline": "全部关闭：展开的 K/V 缓存、全部专家都算；每个基准的对照",
    "mla": "缓存潜向量，而不是逐头的 K/V",
    "moe": "只计算被路由选中的专家",
    "mtp": "用 MTP 层做投机解码",
    "full": "MLA、MoE、MTP 全开",
}


@click.group("profiles", cls=Group, invoke_without_command=True, short_help="看有哪些优化方案")
@click.pass_context
def command(ctx: click.Context) -> None:
    """列出内置的优化方案；show 看一个方案的全部键。

    方案用 + 组合（mla+moe），也可以写成 TOML 文件；--set 覆盖单个键。
    """
    if ctx.invoked_subcommand is not None:
        return
    made = table("内置的优化方案", "名字", "效果")
    for name in BUILTIN_PROFILES:
        made.add_row(name, _EFFECTS[name])
    console().print(made)
    click.echo("\n组合：-p mla+moe    全部键：dsx profiles show mla+moe")


@command.command("show", cls=Command, short_help="打印一个方案的全部键（TOML）")
@click.argument("profile", metavar="NAME")
@set_option
def show(profile: str, overrides: tuple[str, ...]) -> None:
    """打印方案 NAME 解析、校验之后的 TOML，可以存成文件再用 -p 读回来。

    \b
    例：
      dsx profiles show mla+moe --set mla.form=absorb > my.toml
      dsx export CKPT OUT -p ./my.toml
    """
    click.echo(resolve_profile(profile, overrides).to_toml(), nl=False)
