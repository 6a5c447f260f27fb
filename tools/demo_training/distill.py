"""MTP 自蒸馏：主干冻结，MTP 层学主干自己的贪心续写，推理时要猜的正是它。"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_export import api
from tools.demo_training.data import ASSISTANT, BOS, USER
from tools.demo_training.evaluate import Encoded, prompts_of
from tools.demo_training.export import demo_config, load_model, mtp_prefix
from tools.demo_training.loop import DEPTH, Recipe, Trainer
from tools.demo_training.model import DemoModel

_DECODE_ROWS = 64
HELD_PROMPTS, HELD_TOKENS = 16, 24  # 训练曲线用的留出提示：每种语言几条，各几个 token
Batch = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class DistillRecipe(Recipe):
    """蒸馏的超参数；``length`` 是每条序列（提示加续写）的 token 数，``mtp_weights`` 是三次递归的损失权重。

    Attributes:
        sequences: 序列数，中英文各半。
        rows: 每步几条序列。
        shortest: 提示至少几个 token。
        longest: 提示至多几个 token。
        soft: 损失里对主干分布的 KL 的份额，其余是对主干首选的交叉熵。
    """

    steps: int = 700
    length: int = 288
    peak_lr: float = 1e-3
    final_lr: float = 2e-5
    warmup: int = 50
    weight_decay: float = 0.01
    mtp_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    sequences: int = 1024
    rows: int = 4
    shortest: int = 4
    longest: int = 48
    soft: float = 0.5


def sample_prompts(documents: dict[str, Encoded], recipe: DistillRecipe) -> list[list[int]]:
    """从训练篇目取提示，各语言一样多：四分之一是对话，四分之一从篇中起头，其余从篇首起头，长短均匀。"""
    rng, prompts = random.Random(recipe.seed), list[list[int]]()
    for items in documents.values():
        for _ in range(recipe.sequences // len(documents)):
            head, body = rng.choice(items)
            kind = rng.random()
            if kind < 0.25 and len(head) <= recipe.longest:
                prompts.append([BOS, USER, *head[:-1], ASSISTANT])
                continue
            text, length = [*head, *body], rng.randint(recipe.shortest, recipe.longest)
            start = rng.randrange(max(len(text) - length, 1)) if kind > 0.75 else 0
            prompts.append([BOS, *text[start : start + length]])
    return prompts


def held_prompts(documents: dict[str, Encoded]) -> list[list[int]]:
    """训练曲线用的留出提示，各语言一样多，中文在前。"""
    return [ids for items in documents.values() for ids in prompts_of(items, HELD_PROMPTS, HELD_TOKENS)]


def continuations(checkpoint: Path, bundle: Path, prompts: list[list[int]], length: int) -> Iterator[Batch]:
    """用 dsx 编译的主干贪心续写到 ``length`` 个 token（遇 EOS 不停，与基准相同）；逐批给出 ``(提示的下标, 序列)``。"""
    api.export(checkpoint, bundle, "mla+moe", target="ort-cpu", overwrite=True)
    model = api.load(bundle, threads=1)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), _DECODE_ROWS):
        part = order[start : start + _DECODE_ROWS]
        rows = [prompts[index] for index in part]
        got = model.generate(rows, length - len(rows[0]), ignore_eos=True).token_ids
        yield [(index, [*row, *new][:length]) for index, row, new in zip(part, rows, got, strict=True)]


@dataclass(frozen=True)
class Sequences:
    """主干的续写。

    Attributes:
        ids: [N, T]，提示与续写。
        starts: 各提示的长度。
    """

    ids: Tensor
    starts: list[int]

    @classmethod
    def gather(cls, prompts: list[list[int]], batches: Iterable[Batch]) -> Sequences:
        """把 :func:`continuations` 的各批按提示的次序排好。"""
        found = {index: ids for batch in batches for index, ids in batch}
        return cls(torch.tensor([found[index] for index in range(len(prompts))]), [len(p) for p in prompts])


def _origin(model: DemoModel, recipe: DistillRecipe) -> dict[str, Any]:
    """续写由什么决定：冻结的主干与提示的取法。"""
    digest, prefix = hashlib.sha256(), mtp_prefix(model.config)
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            digest.update(tensor.numpy().tobytes())
    kept = ("sequences", "length", "shortest", "longest", "seed")
    return {"main": digest.hexdigest(), **{name: asdict(recipe)[name] for name in kept}}


def save_sequences(path: Path, model: DemoModel, recipe: DistillRecipe, parts: dict[str, Sequences]) -> None:
    """写下续写与它的来历。"""
    plain = {name: (part.ids, part.starts) for name, part in parts.items()}
    torch.save({"origin": _origin(model, recipe), **plain}, path)


def load_sequences(path: Path, model: DemoModel, recipe: DistillRecipe) -> dict[str, Sequences]:
    """读回续写。

    Raises:
        ValueError: 主干或提示的取法与存下时不同。
    """
    saved = torch.load(path, weights_only=True)
    if saved.pop("origin") != _origin(model, recipe):
        raise ValueError(f"{path.name} 出自别的主干或别的超参数；去掉 --resume 从头来")
    return {name: Sequences(*part) for name, part in saved.items()}


@torch.no_grad()
def hidden_states(model: DemoModel, ids: Tensor) -> Iterator[Tensor]:
    """主干冻结，隐状态只算一遍；逐批给出 [b, T, D]。"""
    for part in ids.split(16):
        yield model.trunk(part)


class Distiller(Trainer):
    """只训练 MTP 层；存档、线程、均衡偏置都与 :class:`Trainer` 相同。

    Args:
        model: 冻结的主干与待训练的 MTP 层。
        ids: 主干的续写 [N, T]。
        hidden: 主干在这些序列上的隐状态 [N, T, D]。
        recipe: 超参数。
    """

    recipe: DistillRecipe

    def __init__(self, model: DemoModel, ids: Tensor, hidden: Tensor, recipe: DistillRecipe) -> None:
        super().__init__(model, {}, recipe, trained=model.model.layers[-1])
        self.ids, self.hidden = ids, hidden

    def batch(self) -> Tensor:
        """这一步的序列号；每轮重新洗牌，由步数决定。"""
        n, size = len(self.ids), self.recipe.rows
        first = self.step * size
        return torch.tensor([self._order(at // n)[at % n] for at in range(first, first + size)])

    def _order(self, epoch: int) -> list[int]:
        return random.Random(self.recipe.seed * 1_000_003 + epoch).sample(range(len(self.ids)), len(self.ids))

    def objective(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """三次递归各自的损失与总损失。"""
        values = distill_losses(self.model, self.ids[tokens], self.hidden[tokens], self.recipe.soft)
        weighted = [weight * value for weight, value in zip(self.recipe.mtp_weights, values, strict=True)]
        return values, torch.stack(weighted).sum()


def distill_losses(model: DemoModel, ids: Tensor, hidden: Tensor, soft: float) -> list[Tensor]:
    """第 s 次 MTP 应用在位置 i 猜的词，对照主干在位置 i+s 的分布：``soft`` 份 KL，其余是对首选的交叉熵。"""
    T, result = ids.shape[1] - DEPTH, []
    with torch.no_grad():
        teacher = F.log_softmax(model.lm_head(hidden), -1)
    for step, draft in enumerate(model.drafts(ids, hidden[:, :T], DEPTH), start=1):
        logits = F.log_softmax(model.lm_head(draft), -1).flatten(0, 1)
        wanted = teacher[:, step : step + T].flatten(0, 1)
        hard = F.nll_loss(logits, wanted.argmax(-1))
        result.append(
            (1 - soft) * hard + soft * F.kl_div(logits, wanted, reduction="batchmean", log_target=True)
        )
    return result


@torch.no_grad()
def replay(model: DemoModel, part: Sequences, hidden: Tensor) -> list[float]:
    """续写里的每个位置都当作一次主干调用，前 k 个草稿都猜中的比例，k = 1..3。"""
    training = model.training
    model.eval()
    T, choice = part.ids.shape[1] - DEPTH, model.lm_head(hidden).argmax(-1)
    alive = counted = torch.arange(T)[None] >= torch.tensor(part.starts)[:, None] - 1
    result = []
    for step, draft in enumerate(model.drafts(part.ids, hidden[:, :T], DEPTH), start=1):
        alive = alive & (model.lm_head(draft).argmax(-1) == choice[:, step : step + T])
        result.append(float(alive.sum() / counted.sum()))
    model.train(training)
    return result


def replay_halves(model: DemoModel, part: Sequences, hidden: Tensor) -> dict[str, list[float]]:
    """:func:`replay`，前一半是中文，后一半是英文。"""
    half = len(part.ids) // 2
    return {
        name: replay(model, Sequences(part.ids[rows], part.starts[rows]), hidden[rows])
        for name, rows in (("zh", slice(half)), ("en", slice(half, None)))
    }


def load_demo(path: Path) -> DemoModel:
    """读检查点。

    Raises:
        ValueError: 不是 ``tools/train_demo.py`` 写出的演示检查点。
    """
    model = load_model(path)
    if model.config != demo_config():
        raise ValueError(f"{path} 的 config.json 不是演示检查点的：只蒸馏 tools/train_demo.py 写出的检查点")
    return model


def tokenizer_of(path: Path) -> Any:
    """检查点自带的分词器。"""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json"))
