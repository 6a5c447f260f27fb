"""``dsx pack``。"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from deepseek_export.cli.console import console, echo_json, facts
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import bundle_argument, counts, json_option, verify_weights_option
from deepseek_export.cli.progress import open_progress
from deepseek_export.cli.split import print_stages
from deepseek_export.errors import DsxError
from deepseek_export.units import size


@click.command("pack", cls=Command, short_help="把按引用的 bundle 打包成自包含的文件夹")
@bundle_argument
@click.option(
    "--triton",
    "repository",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="另写成 Triton Inference Server 的模型仓库里的一个模型；OUT 要是打包好的，自己不变。",
)
@click.option("--name", metavar="NAME", help="Triton 里的模型名；缺省是 OUT 的目录名。")
@click.option(
    "--context", type=counts(), help="Triton 里一个序列至多几个 token；缺省 4096，用引擎时由引擎定。"
)
@click.option("--slots", type=click.IntRange(1, 4096), help="Triton 里至多几个序列留着缓存；缺省 8。")
@click.option(
    "--engine",
    metavar="NAME",
    help="给 Triton 的是 OUT/engines 里的这个引擎（例如 tensorrt-sm89），不是 ONNX。",
)
@click.option("--overwrite", is_flag=True, help="替换 Triton 仓库里已有的同名模型。")
@verify_weights_option(True)
@json_option
def command(
    bundle: Path,
    repository: Path | None,
    verify_weights: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """把 --weights reference 导出的 bundle OUT 变成自包含的文件夹，不再依赖检查点和 dsx。

    权重逐块写出，内存与模型大小无关；开工前先核对磁盘空间。被杀之后再运行一次，从写到的地方接着写，结果逐字节相同。完成之前 OUT 保持原样。
    dsx build 另导出在 OUT/engines/bundle 里的那一份不随它打包，要另外 dsx pack OUT/engines/bundle。

    OUT 也可以是一套按引用的 stage：各打包自己的，全部好了一起换上；被杀之后从头再来。

    给了 --triton 就不改 OUT，另写一个 Triton 的模型：缓存归 Triton 的隐式状态，分词、取样、一步一步往下走归客户端。

    \b
    例：
      dsx export CKPT OUT -p full --weights reference
      dsx pack OUT
      dsx pack OUT --triton REPOSITORY --name v3 --context 8192
    """
    if repository is None:
        given = [f"--{name}" for name, value in options.items() if value]
        if given:
            what = f"给了 {'、'.join(given)}，而没有 --triton"
            raise DsxError("DSX-E734", what, "加 --triton DIR，或去掉它们")
        _pack(bundle, verify_weights, as_json)
    else:
        _write_triton(bundle, repository, verify_weights, as_json, **options)


def _pack(bundle: Path, verify_weights: bool, as_json: bool) -> None:
    from deepseek_export.bundle.stages import is_stage_set

    if is_stage_set(bundle):
        _pack_stages(bundle, verify_weights, as_json)
        return
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


def _pack_stages(stages: Path, verify_weights: bool, as_json: bool) -> None:
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        made = api.pack_stages(stages, verify_weights=verify_weights, progress=progress)
    if as_json:
        echo_json({"out": str(made.path), "stages": [item.model_dump() for item in made.record.stages]})
        return
    print_stages(made)


def _write_triton(
    bundle: Path,
    repository: Path,
    verify_weights: bool,
    as_json: bool,
    *,
    slots: int | None,
    **options: Any,
) -> None:
    with open_progress(as_json) as progress:
        progress.start("加载 torch 与 onnx")
        from deepseek_export import api

        model = api.pack_triton(
            bundle, repository, slots=slots or 8, verify_weights=verify_weights, progress=progress, **options
        )
    if as_json:
        echo_json({"out": str(model.path), "context": model.context, "cache_bytes": model.cache_bytes})
        return
    rows = [
        ("一个序列", f"至多 {model.context} 个 token，缓存 {size(model.cache_bytes)}"),
        (
            "Triton 不做的",
            "分词、模板、取样、停止、接着往下走、把几个序列拼成一批、前缀复用、投机解码；dsx serve 都做",
        ),
    ]
    console().print(facts(f"已写 {model.path}", rows))
    click.echo(f"下一步：tritonserver --model-repository {shlex.quote(str(repository))}")
