"""``dsx demo``。"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from deepseek_export.cli.formatting import Command
from deepseek_export.cli.progress import open_progress

CHECKPOINT, BUNDLE = "demo-v3", "demo-v3-mla+moe"
PROMPT = "床前明月光"


@click.command("demo", cls=Command, short_help="在随机权重的小模型上走一遍全程")
@click.option("--path", "path_only", is_flag=True, help="只打印演示检查点的位置，不创建。")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="放在哪里；缺省 $DSX_HOME，再缺省 ~/.cache/dsx。",
)
@click.pass_context
def command(ctx: click.Context, path_only: bool, directory: Path | None) -> None:
    """造一个 DeepSeek-V3 结构的小模型，依次导出、校验、查看、生成；每一步先打印等价的命令。

    权重是随机的，所以生成的文本是乱码；要看的是每一步怎么用、导出与 PyTorch 是否相等。
    """
    directory = directory or home()
    checkpoint, bundle = directory / CHECKPOINT, directory / BUNDLE
    if path_only:
        click.echo(checkpoint)
        return
    if checkpoint.exists():
        click.echo(f"演示检查点：{checkpoint}（已有）")
    else:
        make_checkpoint(checkpoint)
        click.echo(f"演示检查点：{checkpoint}（刚造好）")
    click.echo(
        "DeepSeek-V3 结构，4 层，16 个专家，bf16。权重是随机的：生成的文本是乱码，校验却与真模型一样严格。"
    )
    steps = (
        ("导出", ["export", str(checkpoint), "-p", "mla+moe", "-o", str(bundle), "--overwrite"]),
        ("与 PyTorch 比对", ["verify", str(bundle), "--steps", "16"]),
        ("查看", ["inspect", str(bundle)]),
        ("生成（乱码，因为权重是随机的）", ["generate", str(bundle), "-P", PROMPT, "--max-new-tokens", "32"]),
    )
    group = ctx.parent.command if ctx.parent is not None else None
    assert isinstance(group, click.Group)
    for number, (title, argv) in enumerate(steps, start=1):
        click.echo()
        click.secho(f"── {number}/{len(steps)} {title}", bold=True)
        click.secho(f"$ dsx {shlex.join(argv)}", fg="cyan")
        step = group.get_command(ctx, argv[0])
        assert step is not None
        try:
            with step.make_context(argv[0], argv[1:], parent=ctx.parent) as child:
                step.invoke(child)
        except click.exceptions.Exit as stop:
            if stop.exit_code:
                raise
    click.echo("\n全程走完。换成自己的检查点：dsx export CKPT -p mla+moe -o OUT")


def home() -> Path:
    """``$DSX_HOME``，缺省 ``${XDG_CACHE_HOME:-~/.cache}/dsx``。"""
    if value := os.environ.get("DSX_HOME"):
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsx"


def make_checkpoint(path: Path) -> None:
    """造演示检查点；要么完整出现，要么不出现。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，写不了。
    """
    with open_progress(as_json=False) as progress:
        progress.start("造演示检查点")
        from deepseek_export.bundle.disk import atomic_directory, disk_errors
        from deepseek_export.checkpoint.synthetic import write_demo_checkpoint

        with atomic_directory(path, overwrite=False) as directory, disk_errors(path):
            write_demo_checkpoint(directory)
