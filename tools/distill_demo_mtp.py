"""自蒸馏演示检查点的 MTP 层：主干冻结，MTP 层学主干自己的贪心续写，草稿的接受率因此高得多，主干的输出一个比特也不变。

提示取自 ``tools/train_demo.py`` 的训练篇目（同样的种子、同样的划分），续写由 dsx 编译的主干生成；语料的装法见 ``train_demo.py``。
只改写 ``model.layers.4.*`` 与模型卡。
"""

from __future__ import annotations

import os

# 与 train_demo.py 同理：并行靠 Python 线程，必须在导入 torch 之前设置。
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.demo_training import data, distill, distill_card, evaluate, export
from tools.demo_training.distill import Distiller, DistillRecipe, Sequences

_EVAL_EVERY, _SAVE_EVERY = 100, 50


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="续写与存档放在这里，不进仓库。",
)
@click.option(
    "--steps",
    default=DistillRecipe.steps,
    show_default=True,
    help="训练步数；学习率按它走完余弦，续训时可以改。",
)
@click.option(
    "--seed", default=0, show_default=True, help="数据划分（要与训练时相同）、提示与采样共用的种子。"
)
@click.option("--resume", is_flag=True, help="从 WORK 里的存档续上；已经训练完就只导出与评估。")
def main(checkpoint: Path, work: Path, steps: int, seed: int, resume: bool) -> None:
    """蒸馏 CHECKPOINT 的 MTP 层，在留出集上评估，改写 MTP 权重与模型卡。"""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    recipe = DistillRecipe(steps=steps, warmup=min(DistillRecipe.warmup, max(steps // 10, 1)), seed=seed)
    state = work / "distill.pt"
    try:
        distill_card.check_undistilled(checkpoint)
        model = distill.load_demo(checkpoint)
        corpora = data.load_corpora(seed)
        tokenizer = distill.tokenizer_of(checkpoint)
        train = {name: evaluate.encode(tokenizer, corpus.train) for name, corpus in corpora.items()}
        held = {name: evaluate.encode(tokenizer, corpus.held) for name, corpus in corpora.items()}
        sequences = _sequences(checkpoint, work, model, {"train": train, "held": held}, recipe, resume)
        hidden = {name: _hidden(model, part) for name, part in sequences.items()}
        trainer = Distiller(model, sequences["train"].ids, hidden["train"], recipe)
        if resume and state.exists():
            trainer.load(state)
            click.echo(f"从第 {trainer.step} 步续上")
        _train(trainer, sequences["held"], hidden["held"], state)
        click.echo("评估并导出……")
        # 命令里的目录用约定的名字，不写这台机器上的路径。
        command = f"python -m tools.distill_demo_mtp deepseek_export/demo_checkpoint --work WORK --steps {steps} --seed {seed}"
        text = distill_card.rewritten(checkpoint, trainer, held, command)
        export.replace_mtp(checkpoint, trainer.model)
        (checkpoint / "README.md").write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"已写好：{checkpoint}")


def _sequences(
    checkpoint: Path,
    work: Path,
    model: Any,
    documents: dict[str, dict[str, evaluate.Encoded]],
    recipe: DistillRecipe,
    resume: bool,
) -> dict[str, Sequences]:
    """训练与留出的续写；续训时用存档旁边的那份。"""
    saved = work / "sequences.pt"
    if resume and saved.exists():
        return distill.load_sequences(saved, model, recipe)
    prompts = {
        "train": distill.sample_prompts(documents["train"], recipe),
        "held": distill.held_prompts(documents["held"]),
    }
    result = {}
    for name, rows in prompts.items():
        batches = distill.continuations(checkpoint, work / "bundle", rows, recipe.length)
        result[name] = Sequences.gather(rows, _tracked(batches, len(rows), f"续写（{name}）"))
    distill.save_sequences(saved, model, recipe, result)
    return result


def _hidden(model: Any, part: Sequences) -> torch.Tensor:
    pieces = distill.hidden_states(model, part.ids)
    return torch.cat(list(_tracked(pieces, len(part.ids), "主干的隐状态")))


def _columns(label: str) -> tuple[Any, ...]:
    return (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )


def _tracked(pieces: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """边取边走进度条；每一片的长度就是进度。"""
    with Progress(*_columns(label), refresh_per_second=2) as progress:
        task = progress.add_task("", total=total, note="")
        for piece in pieces:
            progress.advance(task, len(piece))
            yield piece


def _train(trainer: Distiller, held: Sequences, hidden: torch.Tensor, state: Path) -> None:
    smooth: list[float] = []
    with Progress(*_columns("蒸馏"), refresh_per_second=2) as progress:
        task = progress.add_task("", total=trainer.recipe.steps, completed=trainer.step, note="")

        def record() -> None:
            scores = distill.replay_halves(trainer.model, held, hidden)
            trainer.history.append(
                {"step": trainer.step, "train": smooth, "seconds": trainer.seconds, **scores}
            )
            shown = "；".join(
                f"{name} " + " ".join(f"{share:.1%}" for share in shares) for name, shares in scores.items()
            )
            progress.console.print(
                f"第 {trainer.step} 步（{trainer.seconds:.0f} 秒）前 k 个草稿都猜中：{shown}"
            )

        def after_step(values: list[float]) -> None:
            nonlocal smooth
            smooth = [0.95 * old + 0.05 * new for old, new in zip(smooth or values, values, strict=True)]
            note = " ".join(f"{value:.3f}" for value in smooth)
            progress.update(task, completed=trainer.step, note=f"损失 {note}")
            if trainer.step % _EVAL_EVERY == 0 or trainer.step == trainer.recipe.steps:
                record()
            if trainer.step % _SAVE_EVERY == 0 or trainer.step == trainer.recipe.steps:
                trainer.save(state)

        if trainer.step == 0:
            record()
        trainer.run(trainer.recipe.steps, after_step)


if __name__ == "__main__":
    main()
