"""命令行外壳：造一个随机权重的检查点，见 ``deepseek_export.checkpoint.synthetic``。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from deepseek_export.checkpoint.synthetic import write_checkpoint, write_demo_checkpoint
from deepseek_export.errors import DsxError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="HF 的 config.json。"
)
@click.option("--demo", is_flag=True, help="用内置的演示配置，并训练一个小分词器。")
@click.option("--seed", default=0, show_default=True, help="随机种子。")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="权重的 dtype。",
)
@click.option("--shards", default=1, show_default=True, help="分成几个 safetensors 文件。")
@click.option("--mtp", is_flag=True, help="同时写 MTP 层的张量。")
def main(out: Path, config: Path | None, demo: bool, **options: Any) -> None:
    """在 OUT 目录里造一个随机权重的 HF 格式检查点。"""
    if demo == (config is not None):
        raise click.UsageError("--config 与 --demo 必须二选一")
    try:
        if config is None:
            write_demo_checkpoint(out, **options)
        else:
            write_checkpoint(out, json.loads(config.read_text(encoding="utf-8")), **options)
    except (DsxError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"已写好：{out}")


if __name__ == "__main__":
    main()
