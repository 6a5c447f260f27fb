"""训练演示用的小检查点（``deepseek_export/demo_checkpoint``）：DeepSeek-V3 结构，四层加一个 MTP 模块，语料是中文古籍与英文圣经。

语料来自 Debian 软件包 ``fortunes-zh`` 与 ``bible-kjv``（含 ``bible-kjv-text``），先 ``apt-get install`` 它们；
文件用 ``dpkg -L`` 找。古籍与英王钦定本的正文都在公有领域，软件包本身的许可证见模型卡。
"""

from __future__ import annotations

import os

# 并行靠 Recipe.workers 个 Python 线程，各自的算子只用一个线程：OpenMP 的线程抢核时自旋等待，
# 会把一步从不到一秒拖到十几秒。必须在导入 torch 之前设置。
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.demo_training import card, data, evaluate, export
from tools.demo_training.loop import Recipe, Trainer, balance
from tools.demo_training.model import DemoModel

_EVAL_EVERY, _SAVE_EVERY = 250, 100


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="存档与分词器放在这里，不进仓库。",
)
@click.option(
    "--steps", default=Recipe.steps, show_default=True, help="训练步数；学习率按它走完余弦，续训时可以改。"
)
@click.option("--seed", default=0, show_default=True, help="数据划分、初始化与采样共用的种子。")
@click.option("--resume", is_flag=True, help="从 WORK 里的存档续上；已经训练完就只导出与评估。")
@click.option("--dense", is_flag=True, help="对照：换成激活参数相同的稠密模型。")
@click.option("--no-bias-update", is_flag=True, help="对照：不更新 router 的均衡偏置。")
@click.option(
    "--bf16", is_flag=True, help="用 bf16 autocast 训练；这个尺寸在 CPU 上比 float32 慢，所以默认关。"
)
def main(out: Path, work: Path, seed: int, resume: bool, dense: bool, **options: Any) -> None:
    """训练演示检查点，导出到 OUT，并在留出集上评估、写模型卡。"""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        steps=options["steps"],
        warmup=min(Recipe.warmup, max(options["steps"] // 10, 1)),
        bias_update=not options["no_bias_update"],
        autocast=options["bf16"],
        seed=seed,
    )
    config = export.demo_config(dense=dense)
    try:
        corpora = data.load_corpora(seed)
        tokenizer = export.load_or_train_tokenizer(
            work / "tokenizer.json", corpora, config["vocab_size"], resume
        )
        train = {name: evaluate.encode(tokenizer, corpus.train) for name, corpus in corpora.items()}
        held = {name: evaluate.encode(tokenizer, corpus.held) for name, corpus in corpora.items()}
        trainer = Trainer(DemoModel(config, seed), evaluate.streams_of(train, seed), recipe)
        state = work / "state.pt"
        if resume and state.exists():
            trainer.load(state)
            click.echo(f"从第 {trainer.step} 步续上")
        _train(trainer, held, state)
        click.echo("导出并评估……")
        report = card.measure(trainer, tokenizer, {"train": train, "held": held}, out)
        card.write_prompts(out, tokenizer, held)
        card.write(out, work, report, _command(options["steps"], seed, dense, options))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"已写好：{out}")


def _command(steps: int, seed: int, dense: bool, options: dict[str, Any]) -> str:
    """模型卡里写的命令；目录用约定的名字，不写这台机器上的路径。"""
    flags = [name for name, on in (("--dense", dense), ("--no-bias-update", options["no_bias_update"])) if on]
    extra = " ".join([f"--steps {steps} --seed {seed}", *flags])
    return f"python -m tools.train_demo deepseek_export/demo_checkpoint --work WORK {extra}"


def _train(trainer: Trainer, held: dict[str, evaluate.Encoded], state: Path) -> None:
    recipe = trainer.recipe
    windows = {name: evaluate.held_windows(items, recipe.length, 12) for name, items in held.items()}
    columns = (
        TextColumn("训练"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("主损失 {task.fields[main]:.3f}　MTP {task.fields[mtp]}"),
        TimeRemainingColumn(),
    )
    smooth: list[float] = []
    with Progress(*columns, refresh_per_second=2) as progress:
        task = progress.add_task("", total=recipe.steps, completed=trainer.step, main=0.0, mtp="")

        def after_step(values: list[float]) -> None:
            nonlocal smooth
            smooth = [0.95 * old + 0.05 * new for old, new in zip(smooth or values, values, strict=True)]
            mtp = " ".join(f"{value:.2f}" for value in smooth[1:])
            progress.update(task, completed=trainer.step, main=smooth[0], mtp=mtp)
            if trainer.step % _EVAL_EVERY == 0 or trainer.step == recipe.steps:
                scores = {name: evaluate.held_losses(trainer.model, part) for name, part in windows.items()}
                trainer.history.append(
                    {"step": trainer.step, "train": smooth, "seconds": trainer.seconds, **scores}
                )
                shown = "；".join(
                    f"{name} " + " ".join(f"{value:.3f}" for value in part) for name, part in scores.items()
                )
                worst, entropy = (
                    zip(*balance(trainer.loads), strict=True) if trainer.loads else ((1.0,), (1.0,))
                )
                progress.console.print(
                    f"第 {trainer.step} 步（{trainer.seconds:.0f} 秒）训练 {smooth[0]:.3f}／{mtp}，留出 {shown}；"
                    f"专家负载 最大/平均 {max(worst):.2f}，熵 {min(entropy):.3f}"
                )
            if trainer.step % _SAVE_EVERY == 0 or trainer.step == recipe.steps:
                trainer.save(state)

        trainer.run(recipe.steps, after_step)


if __name__ == "__main__":
    main()
