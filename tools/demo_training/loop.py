"""训练循环：主损失加三次递归应用的 MTP 损失，AdamW + 余弦，随时可续。"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo_training.data import Stream
from tools.demo_training.model import DemoModel, Gate

DEPTH = 3  # 训练与评估都递归应用 MTP 模块三次


@dataclass(frozen=True)
class Recipe:
    """训练的全部超参数；续训时除 ``steps`` 外必须与存档里的一致。"""

    steps: int = 4000
    batch_zh: int = 2
    batch_en: int = 4
    workers: int = 2
    length: int = 256
    peak_lr: float = 2e-3
    final_lr: float = 1e-4
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weights: tuple[float, ...] = (0.3, 0.15, 0.1)
    bias_gamma: float = 2e-3
    bias_update: bool = True
    autocast: bool = False
    seed: int = 0

    def lr(self, step: int) -> float:
        """第 ``step`` 步（从 0 数）的学习率。"""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.final_lr + (self.peak_lr - self.final_lr) * 0.5 * (
            1 + math.cos(math.pi * min(progress, 1.0))
        )


def losses(model: DemoModel, tokens: Tensor, rows: Tensor | None = None) -> list[Tensor]:
    """主损失与三次 MTP 应用的损失（没有 MTP 模块就只有前者）；tokens [B, T + 1 + DEPTH]。``rows`` 见 ``DemoModel.drafts``。"""
    T = tokens.shape[1] - 1 - DEPTH
    hidden = model.trunk(tokens[:, :T])
    result = [_cross_entropy(model, hidden, tokens[:, 1 : T + 1])]
    for step, draft in enumerate(model.drafts(tokens, hidden, DEPTH, rows=rows), start=1):
        labels = tokens if step == 1 or rows is None else tokens[rows]
        result.append(_cross_entropy(model, draft, labels[:, step + 1 : step + 1 + T]))
    return result


def _cross_entropy(model: DemoModel, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), labels.flatten())


class Trainer:
    """一次训练。每步的批按行分给 ``workers`` 个线程，各算各的梯度再平均：两核上比一个进程开两个算子线程快。

    同样的超参数与数据逐比特可复现，存档后续训与不中断的结果逐比特相同。

    Args:
        model: 待训练的模型。
        streams: ``zh`` 与 ``en`` 两条 token 流。
        recipe: 超参数。
        trained: 只训练模型的这一部分，其余冻结；缺省全部训练。
    """

    def __init__(
        self,
        model: DemoModel,
        streams: dict[str, Stream],
        recipe: Recipe,
        trained: torch.nn.Module | None = None,
    ) -> None:
        self.model, self.streams, self.recipe = model.train(), streams, recipe
        trained = trained or model
        self.parameters, self.pool = list(trained.parameters()), ThreadPoolExecutor(recipe.workers)
        self.gates = [module for module in trained.modules() if isinstance(module, Gate)]
        model.requires_grad_(False)
        trained.requires_grad_(True)
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98), fused=True)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.loads: list[Tensor] = []
        self.schedule: list[tuple[int, int]] = [(0, recipe.steps)]  # (从第几步起, 按总共几步的余弦)

    def train_step(self) -> list[float]:
        """走一步，返回各项损失（见 :meth:`objective`）。"""
        began, r = time.perf_counter(), self.recipe
        tokens = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = r.lr(self.step)
        parts = [tokens[worker :: r.workers] for worker in range(min(r.workers, len(tokens)))]
        results = list(self.pool.map(self._gradients, parts)) if len(parts) > 1 else [self._gradients(tokens)]
        for parameter, *grads in zip(self.parameters, *(grads for _, grads in results), strict=True):
            parameter.grad = sum(grads[1:], grads[0]) / len(grads)
        torch.nn.utils.clip_grad_norm_(self.parameters, r.clip)
        self.optimizer.step()
        self.loads = [gate.update_bias(r.bias_gamma if r.bias_update else 0.0) for gate in self.gates]
        self.step += 1
        values = torch.stack([values for values, _ in results]).mean(0)
        self.seconds += time.perf_counter() - began
        return values.tolist()

    def batch(self) -> Tensor:
        """这一步的批，按行分给各个线程。"""
        r = self.recipe
        batches = [
            self.streams[name].windows(count, r.length, 1 + DEPTH)
            for name, count in (("zh", r.batch_zh), ("en", r.batch_en))
            if count
        ]
        return torch.cat(batches)

    def objective(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """``[主损失, MTP 损失 1..3]`` 与要最小化的总损失。"""
        r = self.recipe
        rows = torch.arange(self.step % 2, len(tokens), 2) if len(tokens) > 1 else None
        with torch.autocast("cpu", torch.bfloat16, enabled=r.autocast):
            values = losses(self.model, tokens, rows)
        return values, values[0] + sum(
            weight * value for weight, value in zip(r.mtp_weights, values[1:], strict=True)
        )

    def _gradients(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """一份小批的各项损失与总梯度；在线程池里跑，不碰共享状态。"""
        values, total = self.objective(tokens)
        return torch.stack(values).detach(), torch.autograd.grad(
            total, self.parameters, materialize_grads=True
        )

    def run(self, until: int, after_step: Callable[[list[float]], None]) -> None:
        """训练到第 ``until`` 步；每步之后调用 ``after_step``。"""
        while self.step < until:
            after_step(self.train_step())

    def save(self, path: Path) -> None:
        """写存档；先写临时文件再改名，中断不会留下半个文件。"""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "streams": {name: stream.state for name, stream in self.streams.items()},
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "schedule": self.schedule,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """从存档续上；``steps`` 可以改，学习率从这一步起按新的总步数走，改动记在 :attr:`schedule` 里。

        Raises:
            ValueError: 存档的其他超参数与这次的不同。
        """
        state = torch.load(path, weights_only=True)
        saved, wanted = state["recipe"], asdict(self.recipe)
        if different := sorted(key for key in wanted if key != "steps" and saved.get(key) != wanted[key]):
            raise ValueError(f"存档 {path.name} 的超参数不同：{'、'.join(different)}；去掉 --resume 从头训练")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, position in state["streams"].items():
            self.streams[name].load_state(position)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.schedule = state.get("schedule", [(0, saved["steps"])])
        if self.schedule[-1][1] != self.recipe.steps and self.step < self.recipe.steps:
            self.schedule.append((self.step, self.recipe.steps))


def balance(loads: list[Tensor]) -> list[tuple[float, float]]:
    """各 MoE 层的负载均衡：最大负载 / 平均负载，负载分布的熵 / log(专家数)。1.0 是完全均衡。"""
    result = []
    for load in loads:
        share = load / load.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum() / math.log(len(load))
        result.append((float(share.max() * len(load)), float(entropy)))
    return result
