"""``dsx demo``。"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path

import click

from deepseek_export.cli.demo_serve import serve_and_ask
from deepseek_export.cli.formatting import Command
from deepseek_export.disk_cache import home
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.extras import missing_serve

#: 随包附带的检查点：DeepSeek-V3 结构，真的训练过，数据与训练曲线见其中的 README.md。
CHECKPOINT = Path(__file__).resolve().parent.parent / "demo_checkpoint"
BUNDLE, ENGINE_BUNDLE = "demo-full", "demo-tensorrt"
PROMPTS = ("春", "And God said")
QUESTION = "《论语》"


@click.command("demo", cls=Command, short_help="在随包附带的小模型上走一遍全程")
@click.option("--path", "path_only", is_flag=True, help="只打印演示检查点的位置。")
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="bundle 放在哪里；缺省 $DSX_HOME，再缺省 ~/.cache/dsx。",
)
@click.pass_context
def command(ctx: click.Context, path_only: bool, directory: Path | None) -> None:
    """用随包附带的 DeepSeek-V3 结构的小模型，依次导出、校验、查看、生成；装了 TensorRT-RTX 就再为 sm89 建一个引擎；最后开一个 HTTP 服务，问一句，停下它。每一步先打印等价的命令。

    模型只有几百万参数，在古典诗文与英王钦定本圣经上训练过：写得出像样的句子，谈不上通顺；要看的是每一步怎么用、导出与
    PyTorch 是否相等、投机解码省了几次主模型调用。
    """
    if path_only:
        click.echo(CHECKPOINT)
        return
    bundle = (directory or home()) / BUNDLE
    click.echo(f"演示检查点：{CHECKPOINT}（DeepSeek-V3 结构，带一个 MTP 模块）")
    export = ["export", str(CHECKPOINT), "-p", "full", "--set", "mtp.num_draft_tokens=3"]
    export += ["--target", "ort-cpu", "-o", str(bundle), "--overwrite"]
    steps = [
        ("导出", export),
        ("与 PyTorch 比对", ["verify", str(bundle), "--steps", "32"]),
        ("查看", ["inspect", str(bundle)]),
    ]
    for prompt in PROMPTS:
        argv = ["generate", str(bundle), "-P", prompt, "--max-new-tokens", "64", "--stats"]
        steps.append(("生成", argv))
    rtx = FLAVOURS["rtx"]
    missing = rtx.version() is None or find_spec("triton") is None
    if not missing:
        steps += _engine_steps((directory or home()) / ENGINE_BUNDLE)
    group = ctx.parent.command if ctx.parent is not None else None
    assert isinstance(group, click.Group)
    can_serve = not missing_serve()
    total = len(steps) + can_serve
    for number, (title, argv) in enumerate(steps, start=1):
        _announce(number, total, title, argv)
        step = group.get_command(ctx, argv[0])
        assert step is not None
        try:
            with step.make_context(argv[0], argv[1:], parent=ctx.parent) as child:
                step.invoke(child)
        except click.exceptions.Exit as stop:
            if stop.exit_code:
                raise
    if missing:
        click.echo(f"\n没有安装 TensorRT-RTX 或 Triton，没有建引擎：{rtx.install} 'deepseek-export[kernels]'")
    if can_serve:
        _announce(total, total, "开一个服务，问一句", ["serve", str(bundle), "--port", "0"])
        serve_and_ask(bundle, QUESTION)
    else:
        click.echo(f"\n没有安装 {missing_serve()}，没有开服务：pip install -U 'deepseek-export[serve]'")
    click.echo("\n全程走完。换成自己的检查点：dsx export CKPT OUT -p mla+moe")


def _announce(number: int, total: int, title: str, argv: list[str]) -> None:
    click.echo()
    click.secho(f"── {number}/{total} {title}", bold=True)
    click.secho(f"$ dsx {shlex.join(argv)}", fg="cyan")


def _engine_steps(bundle: Path) -> list[tuple[str, list[str]]]:
    """float16 的 bundle，再为 sm89 建引擎：TensorRT-RTX 不需要 GPU。"""
    export = ["export", str(CHECKPOINT), "-p", "full", "--target", "tensorrt-rtx", "--dtype", "float16"]
    return [
        ("导出给 TensorRT", [*export, "-o", str(bundle), "--overwrite"]),
        ("建引擎，看插件层", ["build", str(bundle), "--arch", "sm89"]),
    ]
