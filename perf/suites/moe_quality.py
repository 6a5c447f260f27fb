"""MoE 的质量（MOE-6）：激活参数相同、训练 token 相同，小 MoE 对稠密模型的留出损失；有没有偏置更新时的专家负载。

训练代码是 ``tools/demo_training``，各模型同样的批、步数、优化器与学习率，只训练主干，不带 MTP。
模型小到几分钟能给每个激活参数 20 个 token，两种语言按语料的大小混合、都不超过三遍：远没训够、或者语料重复太多遍的时候，
多出来的专家要么还没用上，要么用来背语料（docs/perf/moe-quality.md）。
语料来自 Debian 软件包 fortunes-zh 与 bible-kjv，没装就拒绝。
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from deepseek_export.benchmark.spread import Spread, paired_ratio
from perf import isolate
from perf.results import Case, SuiteResult
from perf.workload.workspace import Workspace
from tools.demo_training import card, data, evaluate, export
from tools.demo_training.loop import Recipe, Trainer, balance
from tools.demo_training.model import DemoModel

TITLE = "MoE 的质量与专家负载"
#: 系列 → 是不是稠密，更不更新偏置。
SERIES = {"moe": (False, True), "no-bias": (False, False), "dense": (True, True)}
#: 相对演示配置的改动；每 token 激活的专家宽度 (4 + 2) x 16 等于 ``intermediate_size``。
SHAPE: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "n_routed_experts": 32,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
#: 稠密模型每层再宽 8，正好是三层 router 的 3 x 32 x 64 个参数：激活参数一个不差。
DENSE_WIDTH = 104


@dataclass(frozen=True)
class Scenario:
    """固定的场景：演示检查点的训练配方，窗口短一半、行多，没有 MTP 的损失。

    Attributes:
        steps: 每个模型训练几步；每个激活参数恰好 20 个 token 多一点。
        length: 一个窗口的 token 数。
        batch_zh: 一步里中文的行数；两种语言的行数之比就是语料大小之比（1 : 11），重复的遍数因此相同。
        batch_en: 一步里英文的行数。
        peak_lr: 学习率的峰值，余弦降到它的二十分之一；两种模型相同，在种子 0 上按稠密模型挑的（docs/perf/moe-quality.md）。
        evaluations: 沿途在留出集上评估几次。
        load_steps: 最后多少步的专家负载计入直方图。
        windows: 每种语言至多评估留出集的前几个窗口；``None`` 是全部。
        seeds: 每个种子从头训练一遍；散布就是种子之间的。不更新偏置的只用第一个种子。
    """

    steps: int = 1340
    length: int = 128
    batch_zh: int = 2
    batch_en: int = 22
    peak_lr: float = 1.6e-2
    evaluations: int = 10
    load_steps: int = 50
    windows: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Scenario()
QUICK = Scenario(steps=6, evaluations=2, load_steps=3, windows=12, seeds=(0,))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """训练、评估；一个模型一个进程、一个线程，同时训练 ``threads`` 个。模型太小，一个进程里多开线程只会互相等。"""
    scenario = QUICK if quick else FULL
    for seed in scenario.seeds:
        path = _tokenizer_path(workspace.folder, seed)
        export.load_or_train_tokenizer(
            path, data.load_corpora(seed), model_config(False)["vocab_size"], False
        )

    def train_one(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        where, options = str(workspace.folder), asdict(scenario)
        made = isolate.call("perf.suites.moe_quality:prepare", folder=where, name=name, seed=seed, **options)
        click.echo(f"{name}，种子 {seed}：留出损失 {made['curve'][-1]:.4f}", err=True)
        return made

    first = scenario.seeds[0]
    jobs = [(name, seed) for seed in scenario.seeds for name in ("moe", "dense")] + [("no-bias", first)]
    with ThreadPoolExecutor(threads) as pool:
        found = dict(zip(jobs, pool.map(train_one, jobs), strict=True))
    values = {
        f"{name}.held_loss": Spread.of([one["curve"][-1] for job, one in found.items() if job[0] == name])
        for name in SERIES
    }
    shown = {name: found[name, first] for name in SERIES}
    routed = {name: one for name, one in shown.items() if not SERIES[name][0]}
    facts = {
        "steps": shown["moe"]["steps"],
        "curves": {name: one["curve"] for name, one in shown.items()},
        "languages": {
            name: [one["languages"] for job, one in found.items() if job[0] == name] for name in SERIES
        },
        "budget": shown["moe"]["budget"],
        "active_parameters": {name: one["active_parameters"] for name, one in shown.items()},
        "loads": {name: one["loads"] for name, one in routed.items()},
        "balance": {name: one["balance"] for name, one in routed.items()},
    }
    ratio = paired_ratio(values["moe.held_loss"], values["dense.held_loss"])
    case = Case(name="demo", values=values, ratios={"held loss moe/dense": ratio}, facts=facts)
    return SuiteResult(suite="moe-quality", title=TITLE, scenario=asdict(scenario) | SHAPE, cases=[case])


def _tokenizer_path(folder: Path, seed: int) -> Path:
    return folder / f"tokenizer-{seed}.json"


def model_config(dense: bool) -> dict[str, Any]:
    """一种模型的 ``config.json``。"""
    width = {"intermediate_size": DENSE_WIDTH} if dense else {}
    return export.demo_config(dense=dense) | SHAPE | width


def prepare(folder: str, name: str, seed: int, **options: Any) -> Callable[[], dict[str, Any]]:
    """子进程的准备：语料、分词器与模型；返回的函数训练并评估。"""
    torch.set_num_threads(1)
    scenario, (dense, bias) = Scenario(**options), SERIES[name]
    config, corpora = model_config(dense), data.load_corpora(seed)
    tokenizer = export.load_or_train_tokenizer(
        _tokenizer_path(Path(folder), seed), corpora, config["vocab_size"], True
    )
    train = {language: evaluate.encode(tokenizer, corpus.train) for language, corpus in corpora.items()}
    windows = {
        language: evaluate.held_windows(
            evaluate.encode(tokenizer, corpus.held), scenario.length, scenario.windows
        )
        for language, corpus in corpora.items()
    }
    recipe = Recipe(
        steps=scenario.steps,
        batch_zh=scenario.batch_zh,
        batch_en=scenario.batch_en,
        length=scenario.length,
        workers=1,
        peak_lr=scenario.peak_lr,
        final_lr=scenario.peak_lr / 20,
        warmup=min(Recipe.warmup, max(scenario.steps // 10, 1)),
        mtp_weights=(),
        bias_update=bias,
        seed=seed,
    )
    trainer = Trainer(DemoModel(config, seed), evaluate.streams_of(train, seed), recipe)
    every = max(scenario.steps // scenario.evaluations, 1)

    def held() -> dict[str, float]:
        found = {language: evaluate.held_losses(trainer.model, part)[0] for language, part in windows.items()}
        tokens = {language: len(part) for language, part in windows.items()}
        overall = sum(found[language] * count for language, count in tokens.items()) / sum(tokens.values())
        return found | {"all": overall}

    def work() -> dict[str, Any]:
        steps, curve, loads = [], [], []
        for step in range(1, scenario.steps + 1):
            trainer.train_step()
            if step > scenario.steps - scenario.load_steps:
                loads.append(trainer.loads)
            if step % every == 0 or step == scenario.steps:
                steps.append(step)
                curve.append(held())
        active = card.parameter_counts(trainer.model)["active"]
        rows = {"zh": scenario.batch_zh, "en": scenario.batch_en}
        seen = {language: scenario.steps * count * scenario.length for language, count in rows.items()}
        summed = [torch.stack(layer).sum(0) for layer in zip(*loads, strict=True)]
        return {
            "steps": steps,
            "curve": [point["all"] for point in curve],
            "languages": {language: curve[-1][language] for language in windows},
            "active_parameters": active,
            "budget": {
                "tokens_per_active_parameter": sum(seen.values()) / active,
                "epochs": {
                    language: seen[language] / sum(len(head) + len(body) + 2 for head, body in items)
                    for language, items in train.items()
                },
            },
            "loads": [layer.tolist() for layer in summed],
            "balance": balance(summed),
        }

    return work
