"""MoE 的质量（MOE-6）：激活参数相同、训练 token 相同，小 MoE 对稠密模型的留出损失；有没有偏置更新时的专家负载。

三个模型在同一次运行里逐步交替地训练（``tools/demo_training``，即 ``tools/train_demo.py`` 的 ``--dense``、``--no-bias-update``）。
语料来自 Debian 软件包 fortunes-zh 与 bible-kjv，没装就拒绝。
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_export.bench.spread import Spread, paired_ratio
from perf.results import ROOT, Case, SuiteResult
from perf.workspace import Workspace

TITLE = "MoE 的质量与专家负载"
#: 系列 → 是不是稠密，更不更新偏置。
SERIES = {"moe": (False, True), "no-bias": (False, False), "dense": (True, True)}


@dataclass(frozen=True)
class Scenario:
    """固定的场景：演示检查点的训练配方，步数少一些。

    Attributes:
        steps: 每个模型训练几步。
        evaluations: 沿途在留出集上评估几次。
        load_steps: 最后多少步的专家负载计入直方图。
        seeds: 每个种子从头训练一遍；散布就是种子之间的。
    """

    steps: int = 400
    evaluations: int = 8
    load_steps: int = 50
    seeds: tuple[int, ...] = (0, 1)


FULL = Scenario()
QUICK = Scenario(steps=6, evaluations=2, load_steps=3, seeds=(0,))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """训练、评估；线程数由训练配方决定（两个 Python 线程，各算各的梯度）。"""
    sys.path.insert(0, str(ROOT / "tools"))
    scenario = QUICK if quick else FULL
    found = [_train(workspace, scenario, seed) for seed in scenario.seeds]
    values = {f"{name}.held_loss": Spread.of([one["curves"][name][-1] for one in found]) for name in SERIES}
    ratio = paired_ratio(values["moe.held_loss"], values["dense.held_loss"])
    case = Case(name="demo", values=values, ratios={"held loss moe/dense": ratio}, facts=found[-1])
    return SuiteResult(suite="moe-quality", title=TITLE, scenario=asdict(scenario), cases=[case])


def _train(workspace: Workspace, scenario: Scenario, seed: int) -> dict[str, Any]:
    """一个种子：三个模型逐步交替地训练。"""
    from demo_training import card, data, evaluate, export
    from demo_training.loop import Recipe, Trainer, balance
    from demo_training.model import DemoModel

    corpora = data.load_corpora(seed)
    tokenizer_path = workspace.folder / f"tokenizer-{seed}.json"
    config = {name: export.demo_config(dense=dense) for name, (dense, _) in SERIES.items()}
    tokenizer = export.load_or_train_tokenizer(tokenizer_path, corpora, config["moe"]["vocab_size"], False)
    train = {name: evaluate.encode(tokenizer, corpus.train) for name, corpus in corpora.items()}
    held = {name: evaluate.encode(tokenizer, corpus.held) for name, corpus in corpora.items()}
    windows = {name: evaluate.held_windows(items, Recipe.length, 12) for name, items in held.items()}
    warmup = min(Recipe.warmup, max(scenario.steps // 10, 1))
    trainers = {
        name: Trainer(
            DemoModel(config[name], seed),
            evaluate.streams_of(train, seed),
            Recipe(steps=scenario.steps, warmup=warmup, bias_update=bias, seed=seed),
        )
        for name, (_, bias) in SERIES.items()
    }
    every = max(scenario.steps // scenario.evaluations, 1)
    steps: list[int] = []
    curves: dict[str, list[float]] = {name: [] for name in SERIES}
    loads: dict[str, list[Any]] = {name: [] for name in SERIES if not SERIES[name][0]}
    for step in range(1, scenario.steps + 1):
        for name, trainer in trainers.items():
            trainer.train_step()
            if name in loads and step > scenario.steps - scenario.load_steps:
                loads[name].append(trainer.loads)
        if step % every == 0 or step == scenario.steps:
            steps.append(step)
            for name, trainer in trainers.items():
                losses = [evaluate.held_losses(trainer.model, part)[0] for part in windows.values()]
                curves[name].append(statistics.mean(losses))
    summed = {name: [sum(layer) for layer in zip(*found, strict=True)] for name, found in loads.items()}
    return {
        "steps": steps,
        "curves": curves,
        "active_parameters": {name: card.parameter_counts(t.model)["active"] for name, t in trainers.items()},
        "loads": {name: [layer.tolist() for layer in layers] for name, layers in summed.items()},
        "balance": {name: balance(layers) for name, layers in summed.items()},
    }
