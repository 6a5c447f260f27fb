"""一个块：喂什么、应得什么、怎么比；不管由谁来跑：``dsx verify`` 逐块截图执行，``dsx compare`` 存成 Polygraphy 的格式交给各个后端。

路由与挑 key 的近平局也在这里分开：确实换了专家的行单独计数，其余仍按容差要求。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from deepseek_export.parity.arrays import to_torch
from deepseek_export.parity.checks import Level
from deepseek_export.parity.measures import measure
from deepseek_export.parity.report import Case, compare
from deepseek_export.parity.selection import Ranking, mask_of
from deepseek_export.parity.tolerances import ROUTER_MARGIN, SELECTION_BAND, Key, Tolerance, tolerance


@dataclass(frozen=True)
class Output:
    """一个块的一个输出。

    Attributes:
        label: 报告里的名字，例如 ``layers.3.self_attn``。
        value: 图里的值名。
        want: 参考模型给出的值。
        key: 容差表的键。
        decode: int8 的缓存才有：一行字节怎么还原。字节差一不说明差多少，所以比还原出来的值。
        ranking: 选中的 key 才有：参考模型的打分。比的是集合，并列带之内换的不算错。
    """

    label: str
    value: str
    want: np.ndarray
    key: Key
    decode: Callable[[Tensor], Tensor] | None = None
    ranking: Ranking | None = None

    @property
    def tolerance(self) -> Tolerance:
        """这个输出的容差。"""
        return tolerance(*self.key)

    def compare(self, level: Level, name: str, got: np.ndarray) -> Case:
        """量一次、对照容差表。"""
        want = self.want
        if self.ranking is not None:
            T = self.ranking.scores.shape[-1]
            chosen, want = mask_of(got, T), mask_of(want, T)
            chosen, swapped = self.ranking.without_ties(chosen, want, SELECTION_BAND[self.key[1]])
            case = compare(level, name, ("selection", self.key[1], None), chosen, want)
            case.near_ties = swapped
            return case
        if self.decode is not None:
            got, want = (self.decode(to_torch(array)).numpy() for array in (got, want))
        return compare(level, name, self.key, got, want)


@dataclass(frozen=True)
class Block:
    """一个块在一个阶段里的输入与应有的输出，都来自参考模型。

    Attributes:
        name: 块名，例如 ``layers.3.mlp``；草稿模型的前面带图的文件名。
        phase: ``prefill`` 或其后一步的 ``decode``。
        feeds: 图里的值名 → 参考模型的值。
        outputs: 块的输出。
        margin: 前馈块才有：每个 token 的路由离换一个专家有多远，[B, S]。
        residual: 前馈块才有：哪个输入是它每个 token 独立使用的残差。
        selection_margin: 自己挑 key 的注意力块才有：每个 token 离换一个 key 有多远，[B, S]，单位同 ``margin``。
    """

    name: str
    phase: str
    feeds: Mapping[str, np.ndarray]
    outputs: tuple[Output, ...]
    margin: np.ndarray | None = None
    residual: str = ""
    selection_margin: np.ndarray | None = None

    def cases(self, got: Mapping[str, np.ndarray]) -> Iterator[Case]:
        """逐个输出与参照比。

        Args:
            got: 值名 → 被验证的一方算出的值。
        """
        for output in self.outputs:
            name = f"{output.label} ({self.phase})"
            case = output.compare("block", name, got[output.value])
            margin = self.margin if self.margin is not None else self.selection_margin
            # 缓存不受换一个 key 的影响，选中的集合自己认得并列。
            if (
                not case.passed
                and margin is not None
                and output.ranking is None
                and output.want.shape[:-1] == margin.shape
            ):
                case = _without_flipped(case, output, got[output.value], margin)
            yield case


def _without_flipped(case: Case, output: Output, got: np.ndarray, margin: np.ndarray) -> Case:
    """把路由近平局、且确实换了专家的行挑出来单独计数，其余行仍按容差要求。"""
    limit = output.tolerance.limit(measure(got, output.want).scale)
    error = np.abs(got.astype(np.float64) - output.want).max(-1)
    flipped = ~(error <= limit) & (margin < ROUTER_MARGIN[output.key[1]])
    if not flipped.any() or flipped.all():
        return case
    kept = replace(output, want=output.want[~flipped]).compare("block", case.name, got[~flipped])
    kept.near_ties = int(flipped.sum())
    return kept


def spread_near_ties(block: Block) -> tuple[Block, int]:
    """把路由近平局的行换成离平局最远的那一行，使结果不取决于谁的末位误差。

    前馈对每个 token 独立，输入又是直接喂的，换行不影响别的行。Polygraphy 只会逐元素比，不认得近平局。

    Returns:
        换过的块，与换掉的行数。
    """
    if block.margin is None:
        return block, 0
    (output,) = block.outputs
    ties = block.margin < ROUTER_MARGIN[output.key[1]]
    if not ties.any():
        return block, 0
    best = np.unravel_index(int(block.margin.argmax()), block.margin.shape)

    def spread(array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy[ties] = array[best]
        return copy

    feeds = {**block.feeds, block.residual: spread(block.feeds[block.residual])}
    outputs = (replace(output, want=spread(output.want)),)
    return replace(block, feeds=feeds, outputs=outputs, margin=spread(block.margin)), int(ties.sum())
