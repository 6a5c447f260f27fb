"""GPTQ（arXiv 2210.17323）：逐列取码，每一列的误差由后面的列补偿。

最小化 ``tr((W - Q) H (W - Q)^T)``，H 是这一层输入的 Gram 矩阵。与原文的差别：

- 一块的 scale 在几个候选里取损失最小的：每个候选都把这一块完整地走一遍，损失是补偿之后的，不是最近舍入的；
- 列的次序就是存储的次序：scale 沿输入维分块，次序一换块就散了；
- H 按 ``damping`` 加阻尼；从没有激活过的输入因此也有定义。

全部用 torch 的一个线程：结果与线程数无关，同一台机器上每次相同。
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.reference.weights import torch_dtype

#: H 的对角线加上它均值的这么多倍。
DAMPING = 0.01
#: 候选的 scale 是「块里最大的绝对值 / 最大的码」的几倍；7/8 让绝对值最大的负数用上 -8。
_SHRINK = (1.0, 0.95, 0.9, 7 / 8, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
#: 一次处理多少行：候选乘行乘块的中间结果因此不随词表变大。
_ROWS = 4096


@dataclass(frozen=True)
class Codes:
    """一个矩阵的码。

    Attributes:
        steps: [N, K] int8，有符号的码。
        scales: [N, ceil(K/block)]，dtype 是格式里的。
    """

    steps: Tensor
    scales: Tensor

    def values(self, block: int) -> Tensor:
        """[N, K] float32，码乘 scale，没有误差。"""
        wide = self.scales.float().repeat_interleave(block, dim=1)[:, : self.steps.shape[1]]
        return self.steps.float() * wide


@contextmanager
def one_thread() -> Iterator[None]:
    """期间 torch 只用一个线程。"""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Gram:
    """逐批累加的输入的 Gram 矩阵，float64。"""

    def __init__(self, width: int) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """rows [..., K]。"""
        rows = rows.reshape(-1, rows.shape[-1])
        self.sum += (rows.T @ rows).double()
        self.tokens += len(rows)

    @property
    def finite(self) -> bool:
        """输入里没有 NaN、Inf。"""
        return bool(torch.isfinite(self.sum).all())

    def inverse_root(self, damping: float = DAMPING) -> Tensor | None:
        """上三角的 U，``U^T U`` 是加了阻尼的 H 的逆；输入全是零的没有。"""
        mean = float(self.sum.diagonal().mean())
        if mean <= 0:
            return None
        one = torch.eye(len(self.sum), dtype=torch.float64)
        # 倒过来分解一次：flip(L^-1) 就是要的上三角，不必先求逆再分解。
        lower = torch.linalg.cholesky((self.sum + damping * mean * one).flip(0, 1))
        return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1).float()


def gptq(weight: Tensor, root: Tensor, form: BlockFormat) -> Codes:
    """逐块、逐列取码。

    Args:
        weight: [N, K] float32。
        root: :meth:`Gram.inverse_root`。
        form: int4 的格式。
    """
    parts = [_rows(part, root, form) for part in weight.split(_ROWS)]
    return Codes(torch.cat([part.steps for part in parts]), torch.cat([part.scales for part in parts]))


def _rows(weight: Tensor, root: Tensor, form: BlockFormat) -> Codes:
    left = weight.clone()
    steps = torch.empty(weight.shape, dtype=torch.int8)
    scales = []
    for start in range(0, weight.shape[1], form.block):
        block = slice(start, min(start + form.block, weight.shape[1]))
        found, scale, error = _block(left[:, block], root[block, block], form)
        left[:, block.stop :] -= error @ root[block, block.stop :]
        steps[:, block] = found.to(torch.int8)
        scales.append(scale)
    return Codes(steps, torch.stack(scales, dim=1).to(torch_dtype(form.scale)))


def _block(weight: Tensor, root: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """一块：码、scale 与要后面的列补偿的误差（除以 U 的对角线）。"""
    largest = weight.abs().amax(1) / (form.zero - 1)
    candidates = torch.tensor(_SHRINK)[:, None] * largest
    scales = candidates.to(torch_dtype(form.scale)).float()  # [候选, N]
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    left = weight.expand(len(_SHRINK), *weight.shape).clone()
    steps, errors = torch.empty_like(left), torch.empty_like(left)
    for column in range(weight.shape[1]):
        current = left[..., column]
        step = (current * inverse).round_().clamp_(-form.zero, form.zero - 1)
        error = (current - step * scales) / root[column, column]
        left[..., column + 1 :] -= error[..., None] * root[column, column + 1 :]
        steps[..., column], errors[..., column] = step, error
    best = errors.square().sum(-1).argmin(0)
    row = torch.arange(len(weight))
    return steps[best, row], scales[best, row], errors[best, row]
