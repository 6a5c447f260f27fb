"""MoE 的质量（MOE-6）：激活参数相同、训练 token 相同，小 MoE 对稠密模型的留出损失；有没有偏置更新时的专家负载。

几个模型在同一次运行里逐步交替地训练（``tools/demo_training``）：同样的批、步数、优化器与学习率，只训练主干，不带 MTP。
配置是演示检查点的一半宽、专家切得更细：演示检查点自己的宽度在几分钟的训练里用不满稠密模型的容量，看不出专家的作用（specs/moe 的表）。
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
#: 相对演示配置的改动；每 token 激活的专家宽度 (4 + 2) x 32 等于 ``intermediate_size``。
SHAPE: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 32,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
#: 稠密模型每层再宽 8，正好是三层 router 的 3 x 32 x 128 个参数：激活参数一个不差。
DENSE_WIDTH = 200


@dataclass(frozen=True)
class Scenario:
    """固定的场景：演示检查点的训练配方，步数少一些，没有 MTP 的损失。

    Attributes:
        steps: 每个模型训练几步。
        evaluations: 沿途在留出集上评估几次。
        load_steps: 最后多少步的专家负载计入直方图。
        windows: 每种语言至多评估留出集的前几个窗口。
        seeds: 每个种子从头训练一遍；散布就是种子之间的。不更新偏置的只用第一个种子。
    """

    steps: int = 700
    evaluations: int = 7
    load_steps: int = 50
    windows: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Scenario()
QUICK = Scenario(steps=6, evaluations=2, load_steps=3, windows=12, seeds=(0,))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """训练、评估；线程数由训练配方决定（两个 Python 线程，各算各的梯度，算子都用一个线程）。"""
    import torch

    sys.path.insert(0, str(ROOT / "tools"))
    scenario, before = QUICK if quick else FULL, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [_train(workspace, scenario, seed) for seed in scenario.seeds]
    finally:
        torch.set_num_threads(before)
    values = {
        f"{name}.held_loss": Spread.of([one["curves"][name][-1] for one in found if name in one["curves"]])
        for name in SERIES
    }
    ratio = paired_ratio(values["moe.held_loss"], values["dense.held_loss"])
    case = Case(name="demo", values=values, ratios={"held loss moe/dense": ratio}, facts=found[0])
    return SuiteResult(suite="moe-quality", title=TITLE, scenario=asdict(scenario) | SHAPE, cases=[case])


def _train(workspace: Workspace, scenario: Scenario, seed: int) -> dict[str, Any]:
    """一个种子：几个模型逐步交替地训练。"""
    from demo_training import card, data, evaluate, export
    from demo_training.loop import Recipe, Trainer, balance
    from demo_training.model import DemoModel

    corpora = data.load_corpora(seed)
    tokenizer_path = workspace.folder / f"tokenizer-{seed}.json"
    series = {name: kind for name, kind in SERIES.items() if name != "no-bias" or seed == scenario.seeds[0]}
    wider = {False: SHAPE, True: SHAPE | {"intermediate_size": DENSE_WIDTH}}
    config = {name: export.demo_config(dense=dense) | wider[dense] for name, (dense, _) in series.items()}
    tokenizer = export.load_or_train_tokenizer(tokenizer_path, corpora, config["moe"]["vocab_size"], False)
    train = {name: evaluate.encode(tokenizer, corpus.train) for name, corpus in corpora.items()}
    held = {name: evaluate.encode(tokenizer, corpus.held) for name, corpus in corpora.items()}
    windows = {
        name: evaluate.held_windows(items, Recipe.length, scenario.windows) for name, items in held.items()
    }
    warmup = min(Recipe.warmup, max(scenario.steps // 10, 1))
    trainers = {
        name: Trainer(
            DemoModel(config[name], seed),
            evaluate.streams_of(train, seed),
            Recipe(steps=scenario.steps, warmup=warmup, mtp_weights=(), bias_update=bias, seed=seed),
        )
        for name, (_, bias) in series.items()
    }
    every = max(scenario.steps // scenario.evaluations, 1)
    steps: list[int] = []
    curves: dict[str, list[float]] = {name: [] for name in series}
    loads: dict[str, list[Any]] = {name: [] for name, (dense, _) in series.items() if not dense}
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
