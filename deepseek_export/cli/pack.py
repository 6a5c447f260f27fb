"""``dsx pack``。"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from deepseek_export.cli.console import console, echo_json, facts
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import bundle_argument, json_option, verify_weights_option
from deepseek_export.cli.progress import open_progress
from deepseek_export.units import size


@click.command("pack", cls=Command, short_help="把按引用的 bundle 打包成自包含的文件夹")
@bundle_argument
@verify_weights_option(True)
@json_option
def command(bundle: Path, verify_weights: bool, as_json: bool) -> None:
    """把 --weights reference 导出的 bundle OUT 变成自包含的文件夹，不再依赖检查点和 dsx。

    权重逐块写出，内存与模型大小无关；开工前先核对磁盘空间。被杀之后再运行一次，从写到的地方接着写，结果逐字节相同。完成之前 OUT 保持原样。
    dsx build 另导出在 OUT/engines/bundle 里的那一份不随它打包，要另外 dsx pack OUT/engines/bundle。

    \b
    例：
      dsx export CKPT -p full -o OUT --weights reference
      dsx pack OUT
    """
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        packed = api.pack(bundle, verify_weights=verify_weights, progress=progress)
    name = packed.manifest.weights.files[0]
    entry = packed.manifest.files[name]
    if as_json:
        echo_json({"out": str(packed.path), "weights": name, **entry.model_dump()})
        return
    rows = [("权重", f"{name}，{size(entry.bytes)}"), ("sha256", entry.sha256)]
    console().print(facts(f"已打包 {bundle}", rows))
    click.echo(f"下一步：dsx verify {shlex.quote(str(bundle))}")
