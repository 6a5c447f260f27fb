"""蒸馏之后改写模型卡：加“MTP 自蒸馏”一节，重测“留出集上的结果”一节；其余各节是 ``train_demo.py`` 写的，主干没变，照旧成立。"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tools.demo_training import card, evaluate, export
from tools.demo_training.distill import HELD_PROMPTS, HELD_TOKENS, Distiller
from tools.demo_training.evaluate import Encoded
from tools.demo_training.loop import DEPTH, Recipe

_DISTILL, _RESULTS, _SAMPLES = "## MTP 自蒸馏\n", "## 留出集上的结果\n", "## 样例\n"
_NAMES = {"zh": "中文", "en": "英文"}


def check_undistilled(checkpoint: Path) -> None:
    """蒸馏要从 ``train_demo.py`` 的产物开始，否则写不出可复现的命令。

    Raises:
        ValueError: 模型卡缺少要改写的两节，或者已经蒸馏过。
    """
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    if missing := [title.strip("# \n") for title in (_RESULTS, _SAMPLES) if text.count(title) != 1]:
        raise ValueError(
            f"{checkpoint / 'README.md'} 不是 train_demo.py 写的模型卡：没有{'、'.join(missing)}一节"
        )
    if _DISTILL in text:
        raise ValueError(f"{checkpoint} 已经蒸馏过；要重做，先用 tools/train_demo.py 重写它")


def rewritten(checkpoint: Path, trainer: Distiller, held: dict[str, Encoded], command: str) -> str:
    """新的模型卡；读的还是没有改写的检查点，蒸馏前后各评估一遍。

    Args:
        checkpoint: 蒸馏之前的检查点。
        trainer: 训练完的一次蒸馏。
        held: 留出的篇目。
        command: 模型卡里写的命令。
    """
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    head, tail = text[: text.index(_RESULTS)], text[text.index(_SAMPLES) :]
    model, original = export.as_exported(trainer.model), export.load_model(checkpoint)
    before = {
        name: evaluate.held_losses(original, evaluate.held_windows(items, Recipe.length))
        for name, items in held.items()
    }
    measured = {"config": model.config} | card.measure_held(model, held, Recipe.length)
    return head + _render(trainer, before, command) + card.render_results(measured) + tail


def _render(trainer: Distiller, before: dict[str, list[float]], command: str) -> str:
    r = trainer.recipe
    curve = "\n".join(
        f"| {row['step']} | {' / '.join(f'{value:.3f}' for value in row['train']) or '—'} | "
        + " | ".join(f"{share:.1%}" for name in _NAMES for share in row[name])
        + " |"
        for row in trainer.history
    )
    template = (Path(__file__).parent / "card_distill.md").read_text(encoding="utf-8")
    return template.format(
        layer=trainer.model.model.depth,
        command=command,
        sequences=len(trainer.ids),
        r={name: getattr(r, name) for name in r.__dataclass_fields__},
        soft=r.soft,
        hard=1 - r.soft,
        weights=" / ".join(f"{weight:g}" for weight in r.mtp_weights),
        minutes=trainer.seconds / 60,
        schedule="".join(
            f"日程改过：先按 {old} 步的余弦走（`--steps {old}`），第 {step} 步起改按 {new} 步（`--resume --steps {new}`）。"
            for (_, old), (step, new) in pairwise(trainer.schedule)
        ),
        prompts=HELD_PROMPTS,
        prompt_tokens=HELD_TOKENS,
        curve=curve,
        before="，".join(
            f"{label} " + " / ".join(f"{value:.3f}" for value in before[name][1 : 1 + DEPTH])
            for name, label in _NAMES.items()
        ),
    )
