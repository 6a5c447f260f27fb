"""训练完之后：导出、在留出集上评估、写模型卡与 ``report.json``。"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.demo_training import evaluate, export
from tools.demo_training.data import ASSISTANT, BOS, USER
from tools.demo_training.evaluate import Acceptance, Encoded
from tools.demo_training.loop import Trainer, balance
from tools.demo_training.model import DemoModel

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 12, 24, 96
_HELDOUT = 10
_SAMPLES = (
    "《春夜》李白\n",
    "明月",
    "《论语》\n子曰：“君子",
    "And it came to pass",
    "And God said unto Noah,",
)
_CHATS = ("《秋夜》王维", "The LORD is my shepherd; I shall not want.")


def measure(
    trainer: Trainer, tokenizer: Any, data: dict[str, dict[str, Encoded]], out: Path
) -> dict[str, Any]:
    """导出到 ``out``，再把导出的权重读回来评估（bf16 舍入之后的数）。

    Args:
        trainer: 训练完的一次训练。
        tokenizer: ``tokenizers`` 的分词器。
        data: ``train`` 与 ``held`` 的篇目，各按语言分。
        out: 检查点目录。
    """
    export.write_checkpoint(out, trainer.model, tokenizer)
    model = export.load_model(out)
    report: dict[str, Any] = {
        "config": model.config,
        "recipe": {key: getattr(trainer.recipe, key) for key in trainer.recipe.__dataclass_fields__},
        "seconds": trainer.seconds,
        "parameters": parameter_counts(model),
        "train_tokens": {
            name: sum(len(a) + len(b) for a, b in items) for name, items in data["train"].items()
        },
        "history": trainer.history,
        "schedule": trainer.schedule,
        **measure_held(model, data["held"], trainer.recipe.length),
    }
    report["samples"] = [
        (kind, tokenizer.decode(ids, skip_special_tokens=kind != "对话"), _complete(model, tokenizer, ids))
        for kind, ids in _sample_prompts(tokenizer, data["held"])
    ]
    return report


def measure_held(model: DemoModel, held: dict[str, Encoded], length: int) -> dict[str, Any]:
    """留出集上的损失、接受率、一致率与负载均衡；``length`` 是窗口的 token 数。"""
    windows = {name: evaluate.held_windows(items, length) for name, items in held.items()}
    acceptance = {name: _acceptance(model, items) for name, items in held.items()}
    return {
        "held_tokens": {name: part.shape[0] * length for name, part in windows.items()},
        "held_losses": {name: evaluate.held_losses(model, part) for name, part in windows.items()},
        "agreement": {name: evaluate.agreement(model, part) for name, part in windows.items()},
        "balance": _held_balance(model, windows),
        "acceptance": acceptance | {"全部": sum(acceptance.values(), Acceptance())},
    }


def write_prompts(out: Path, tokenizer: Any, held: dict[str, Encoded]) -> None:
    """留出集的开头存成 ``heldout_prompts.json``（各语言十条），供 ``python -m perf run mtp`` 与测试用；末尾不完整的汉字去掉。"""
    texts = [
        tokenizer.decode(ids).rstrip("\ufffd")
        for items in held.values()
        for ids in evaluate.prompts_of(items, _HELDOUT, _PROMPT_TOKENS)
    ]
    text = json.dumps(texts, ensure_ascii=False, indent=1) + "\n"
    (out / "heldout_prompts.json").write_text(text, encoding="utf-8")


def _sample_prompts(tokenizer: Any, held: dict[str, Encoded]) -> list[tuple[str, list[int]]]:
    """样例的提示，``(种类, token)``。"""
    own = [tokenizer.encode(text, add_special_tokens=False).ids for text in _SAMPLES]
    chats = [tokenizer.encode(text, add_special_tokens=False).ids for text in _CHATS]
    return [
        *[("自拟的提示", [BOS, *ids]) for ids in own],
        *[("对话", [BOS, USER, *ids, ASSISTANT]) for ids in chats],
        *[
            ("留出集里的开头", ids)
            for items in held.values()
            for ids in evaluate.prompts_of(items, 3, _PROMPT_TOKENS)
        ],
    ]


def parameter_counts(model: DemoModel) -> dict[str, int]:
    """参数量：全部、MTP 层、主干每 token 激活的（不算词嵌入，它只是查表）。"""
    config, total, mtp, idle = model.config, 0, 0, 0
    last = f"model.layers.{config['num_hidden_layers']}."
    for name, weight in model.named_parameters():
        total += weight.numel()
        if name.startswith(last):
            mtp += weight.numel()
        elif ".mlp.experts." in name:
            idle += weight.numel()
    active_share = config["num_experts_per_tok"] / config["n_routed_experts"]
    active = total - mtp - model.model.embed_tokens.weight.numel() - round(idle * (1 - active_share))
    return {"total": total, "mtp": mtp, "active": active}


@torch.no_grad()
def _held_balance(model: DemoModel, windows: dict[str, Tensor]) -> list[tuple[float, float]]:
    """留出集上各 MoE 层的负载均衡，只算主干与第一次 MTP 应用。"""
    model.train()  # 只为累计负载；不求梯度，偏置也不更新
    for part in (part for group in windows.values() for part in group.split(8)):
        next(model.drafts(part, model.trunk(part[:, :-4]), 1))
    model.eval()
    return balance([gate.take_load() for gate in model.gates])


def _acceptance(model: DemoModel, items: Encoded) -> Acceptance:
    prompts = evaluate.prompts_of(items, _PROMPTS, _PROMPT_TOKENS)
    sequences = evaluate.greedy(model, prompts, _NEW_TOKENS)
    runs = [
        evaluate.acceptance(model, ids, len(prompt)) for ids, prompt in zip(sequences, prompts, strict=True)
    ]
    return sum(runs, Acceptance())


def _complete(model: DemoModel, tokenizer: Any, prompt: list[int]) -> str:
    ids = evaluate.greedy(model, [prompt], _NEW_TOKENS)[0]
    return str(tokenizer.decode(ids[len(prompt) :]))


def write(out: Path, work: Path, report: dict[str, Any], command: str) -> None:
    """写 ``OUT/README.md`` 与 ``WORK/report.json``。"""
    (out / "README.md").write_text(_render(report, command), encoding="utf-8")
    plain = report | {"acceptance": {name: item.summary() for name, item in report["acceptance"].items()}}
    text = json.dumps(plain, ensure_ascii=False, indent=1)
    (work / "report.json").write_text(text + "\n", encoding="utf-8")


def _render(r: dict[str, Any], command: str) -> str:
    c, p = r["config"], r["parameters"]
    curve = "\n".join(
        f"| {row['step']} | {row['train'][0]:.3f} | {row['train'][1]:.3f} | {row['zh'][0]:.3f} | {row['en'][0]:.3f} |"
        for row in r["history"]
        if row["step"] % 500 == 0 or row is r["history"][-1]
    )
    samples = "\n\n".join(
        f"{kind}：\n\n```text\n{text}【续】{output}\n```" for kind, text, output in r["samples"]
    )
    experts = (
        f"{c['n_routed_experts']} 个路由专家（宽 {c['moe_intermediate_size']}）加 1 个共享专家，分 {c['n_group']} 组，"
        f"先选 {c['topk_group']} 组再选 {c['num_experts_per_tok']} 个，sigmoid 打分，noaux_tc"
    )
    if not r["balance"]:
        experts = f"没有：对照组，全部层稠密，宽 {c['intermediate_size']}"
    return _CARD.format(
        total=p["total"] / 1e6,
        mtp=p["mtp"] / 1e6,
        active=p["active"] / 1e6,
        c=c,
        experts=experts,
        curve=curve,
        results=render_results(r),
        samples=samples,
        command=command,
        minutes=r["seconds"] / 60,
        zh=r["train_tokens"]["zh"] / 1e3,
        en=r["train_tokens"]["en"] / 1e3,
        schedule="".join(
            f"日程改过：先按 {before} 步的余弦走（`--steps {before}`），第 {step} 步起改按 {after} 步（`--resume --steps {after}`）。"
            for (_, before), (step, after) in pairwise(r["schedule"])
        ),
        **_budget(r["recipe"], r["train_tokens"]),
        r=r["recipe"],
    )


def render_results(r: dict[str, Any]) -> str:
    """模型卡的“留出集上的结果”一节，数据见 :func:`measure_held`。"""
    c, names = r["config"], {"zh": "中文", "en": "英文", "全部": "全部"}
    held = "\n".join(
        f"| {names[name]} | {r['held_tokens'][name]} | "
        + " | ".join(f"{value:.3f}" for value in values)
        + " |"
        for name, values in r["held_losses"].items()
    )
    accepted = "\n".join(
        f"| {names[name]} | {a.prompts} | "
        + " | ".join(f"{share:.1%}" for share in a.per_position)
        + f" | {a.tokens_per_call:.2f} |"
        for name, a in r["acceptance"].items()
    )
    agreed = "\n".join(
        f"| {names[name]} | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
        for name, shares in r["agreement"].items()
    )
    layers = [f"第 {index} 层" for index in range(c["first_k_dense_replace"], c["num_hidden_layers"])] + [
        "MTP 层"
    ]
    load = (
        "；".join(f"{n} {m:.2f}、{e:.3f}" for n, (m, e) in zip(layers, r["balance"], strict=False))
        or "（稠密，没有专家）"
    )
    return _RESULTS.format(
        held=held,
        accepted=accepted,
        agreed=agreed,
        load=load,
        prompt=_PROMPT_TOKENS,
        new=_NEW_TOKENS,
    )


def _budget(recipe: dict[str, Any], train_tokens: dict[str, int]) -> dict[str, float]:
    """训练走过的 token：每批几行、共几百万、中文占比、每种语言几遍。"""
    rows = {"zh": recipe["batch_zh"], "en": recipe["batch_en"]}
    seen = {name: recipe["steps"] * count * recipe["length"] for name, count in rows.items()}
    return {
        "rows": sum(rows.values()),
        "tokens": sum(seen.values()) / 1e6,
        "share": rows["zh"] / sum(rows.values()),
        "epochs_zh": seen["zh"] / train_tokens["zh"],
        "epochs_en": seen["en"] / train_tokens["en"],
    }


_CARD = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
_RESULTS = (Path(__file__).parent / "card_results.md").read_text(encoding="utf-8")
