"""留出集上的评估：主干与 MTP 的损失、贪心生成、投机解码的接受率。"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tools.demo_training.data import BOS, EOS, Stream
from tools.demo_training.loop import DEPTH, losses
from tools.demo_training.model import DemoModel

Encoded = list[tuple[list[int], list[int]]]


def held_windows(documents: Encoded, length: int, limit: int | None = None) -> Tensor:
    """把留出的篇目首尾相接，切成 [n, length + 1 + DEPTH] 的窗口。"""
    tokens = torch.tensor([token for head, body in documents for token in (BOS, *head, *body, EOS)])
    length = min(length, len(tokens) - 1 - DEPTH)
    return tokens.unfold(0, length + 1 + DEPTH, length)[:limit]


@torch.no_grad()
def held_losses(model: DemoModel, windows: Tensor, batch: int = 8) -> list[float]:
    """``[主损失, MTP 损失 1..3]``，每 token 的自然对数。"""
    training = model.training
    model.eval()
    sums = [len(part) * torch.stack(losses(model, part)).double() for part in windows.split(batch)]
    model.train(training)
    return (torch.stack(sums).sum(0) / len(windows)).tolist()


@torch.no_grad()
def greedy(model: DemoModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """贪心续写，遇 EOS 停；每步重算整个前缀（没有缓存），等长的提示一起算。返回含提示的完整序列。"""
    model.eval()
    results: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        group = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[index] for index in group])
        for _ in range(new_tokens):
            following = model.lm_head(model.trunk(ids)[:, -1]).argmax(-1, keepdim=True)
            following[(ids[:, length:] == EOS).any(1)] = EOS
            ids = torch.cat([ids, following], dim=1)
            if bool((following == EOS).all()):
                break
        for index, row in zip(group, ids.tolist(), strict=True):
            end = row.index(EOS, length) + 1 if EOS in row[length:] else len(row)
            results[index] = row[:end]
    return [results[index] for index in range(len(prompts))]


@torch.no_grad()
def agreement(model: DemoModel, windows: Tensor, batch: int = 8) -> list[float]:
    """真实文本上，第 k 次 MTP 应用与主干的首选一致的比例：两者看到同样的前文，不受贪心续写打转的影响。"""
    model.eval()
    hits, total = torch.zeros(DEPTH, dtype=torch.double), 0
    for part in windows.split(batch):
        hidden = model.trunk(part)
        choice = model.lm_head(hidden).argmax(-1)
        T = part.shape[1] - DEPTH
        for step, draft in enumerate(model.drafts(part, hidden[:, :T], DEPTH)):
            same = model.lm_head(draft).argmax(-1) == choice[:, step + 1 : step + 1 + T]
            hits[step] += same.sum()
        total += len(part) * T
    return (hits / total).tolist()


@dataclass
class Acceptance:
    """投机解码的统计；可以相加。"""

    prompts: int = 0
    calls: int = 0
    tokens: int = 0
    offered: tuple[int, ...] = (0,) * DEPTH
    accepted: tuple[int, ...] = (0,) * DEPTH

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(
            self.prompts + other.prompts,
            self.calls + other.calls,
            self.tokens + other.tokens,
            tuple(a + b for a, b in zip(self.offered, other.offered, strict=True)),
            tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True)),
        )

    @property
    def per_position(self) -> list[float]:
        """第 k 个草稿被接受的比例，分母是全部主干调用（不以前一个草稿被接受为条件）。"""
        return [a / max(o, 1) for a, o in zip(self.accepted, self.offered, strict=True)]

    @property
    def tokens_per_call(self) -> float:
        """每次主干调用平均确定几个 token。"""
        return self.tokens / max(self.calls, 1)

    def summary(self) -> dict[str, object]:
        """写进 JSON 的样子。"""
        return asdict(self) | {"per_position": self.per_position, "tokens_per_call": self.tokens_per_call}


@torch.no_grad()
def acceptance(model: DemoModel, ids: list[int], prompt_length: int, depth: int = DEPTH) -> Acceptance:
    """按贪心序列 ``ids`` 回放投机解码：每次主干调用给出一个 token，再验证 MTP 递归给出的 ``depth`` 个草稿。

    一次前向就够：前面的草稿都被接受时，草稿看到的输入就是贪心序列本身；第一个被拒之后的草稿反正作废。
    草稿超出序列末尾（含 EOS 之后）不计入分母。
    """
    model.eval()
    last = len(ids) - 1
    padded = torch.tensor([ids + [EOS] * (depth + 1)])
    hidden = model.trunk(padded[:, :last])
    guesses = [model.lm_head(draft)[0].argmax(-1).tolist() for draft in model.drafts(padded, hidden, depth)]
    offered, accepted = [0] * depth, [0] * depth
    calls = tokens = 0
    position = prompt_length - 1
    while position < last:  # 主干在 position 处给出 ids[position + 1]
        calls, tokens, hits = calls + 1, tokens + 1, 0
        alive = True
        for step in range(depth):
            target = position + 2 + step
            if target > last:
                break
            offered[step] += 1
            alive = alive and guesses[step][position] == ids[target]
            accepted[step] += alive
            hits += alive
        tokens, position = tokens + hits, position + 1 + hits
    return Acceptance(1, calls, tokens, tuple(offered), tuple(accepted))


def prompts_of(documents: Encoded, count: int, length: int) -> list[list[int]]:
    """从留出篇目取 ``count`` 条提示：BOS 加篇目开头的 ``length`` 个 token。"""
    long_enough = [[*head, *body] for head, body in documents if len(head) + len(body) >= 2 * length]
    stride = max(1, len(long_enough) // count)
    return [[BOS, *tokens[:length]] for tokens in long_enough[::stride][:count]]


def encode(tokenizer: Any, documents: list[tuple[str, str]]) -> Encoded:
    """``(开头, 其余)`` 的 token；两段分开编码，开头总以换行收尾，拼起来与整段编码相同。"""
    encoded = [
        tokenizer.encode_batch(list(part), add_special_tokens=False) for part in zip(*documents, strict=True)
    ]
    return [(head.ids, body.ids) for head, body in zip(*encoded, strict=True)]


def streams_of(encoded: dict[str, Encoded], seed: int) -> dict[str, Stream]:
    """每种语言一条训练流。"""
    return {name: Stream(items, seed + 97 * index) for index, (name, items) in enumerate(encoded.items())}
