"""``dsx split``。"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, echo_json, table
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import balance_option, bundle_argument, json_option
from deepseek_export.cli.progress import open_progress
from deepseek_export.units import size

if TYPE_CHECKING:
    from deepseek_export.bundle.stages import StageSet


@click.command("split", cls=Command, short_help="把 bundle 在层的边上切成一套 stage")
@bundle_argument
@click.option(
    "--stages",
    metavar="N|0-14,15-29",
    required=True,
    help="切成几个，尽量均匀；或写明各段的层，含首尾。",
)
@balance_option("bytes")
@click.option(
    "-o",
    "--out",
    metavar="STAGES",
    type=click.Path(path_type=Path),
    required=True,
    help="这套 stage 的目录。",
)
@click.option("--overwrite", is_flag=True, help="STAGES 已是一套 stage 时替换它。")
@json_option
def command(bundle: Path, stages: str, balance: Any, out: Path, overwrite: bool, as_json: bool) -> None:
    """把 bundle OUT 切成一套 stage：一台机器放不下的模型，分给几个进程或几台机器。

    每个 stage 是连着的几层，自己就是一个 bundle，只带自己的权重与缓存；层与层之间只过 hidden。词嵌入在第一个，末尾的归一化、输出头与草稿模型在
    最后一个。打包的只拷自己的字节，按引用的只硬链接用得到的检查点文件；OUT 不变。dsx generate、serve、bench、verify 收 STAGES 同收 OUT：在本机上给每个 stage
    起一个进程，结果逐位相同。

    \b
    例：
      dsx split OUT --stages 4 -o STAGES
      dsx split OUT --stages 0-14,15-29,30-60 -o STAGES
      dsx generate STAGES -P "床前明月光"
    """
    with open_progress(as_json) as progress:
        progress.start("加载 onnx")
        from deepseek_export import api

        made = api.split(bundle, out, stages, balance=balance, overwrite=overwrite, progress=progress)
    if as_json:
        items = [item.model_dump() for item in made.record.stages]
        echo_json({"out": str(made.path), "stages": items})
        return
    print_stages(made)


def print_stages(made: StageSet) -> None:
    """各 stage 的层与权重，一行一个。"""
    shown = table(f"{made.path}：{len(made.record.stages)} 个 stage", "目录", "层", "权重", right=("权重",))
    for item in made.record.stages:
        shown.add_row(item.directory, layer_span(item.layers), size(item.weight_bytes))
    console().print(shown)
    click.echo(f"下一步：dsx generate {shlex.quote(str(made.path))} --ids 1,2,3")


def layer_span(layers: Sequence[int]) -> str:
    """连着的几层的首尾。"""
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])
