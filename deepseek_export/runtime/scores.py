"""一次前向给出的分数：全部的 logits，或只有每个位置最大的那个。

后端的图自己选得出最大的（输出 :data:`BEST`），又没有人要 logits 时，一步只取回几个数；别的后端照样取 logits，在主机上选。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from deepseek_export.backend.contract import GraphContract
from deepseek_export.records import BEST_ID, BEST_LOGIT

LOGITS = "logits"
#: 只要最大的那个时，取哪些输出。
BEST = (BEST_ID, BEST_LOGIT)


@dataclass(frozen=True)
class Scores:
    """B 行各 L 个位置的分数。

    Attributes:
        arrays: 取回的输出，``logits`` ``[B, L, V]``，或 :data:`BEST` 两个 ``[B, L, 1]``。
    """

    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, got: Mapping[str, np.ndarray]) -> Scores:
        """一次前向取回的各输出里，与分数有关的。"""
        return cls({name: got[name] for name in (LOGITS, *BEST) if name in got})

    @property
    def logits(self) -> np.ndarray | None:
        """``[B, L, V]`` 浮点；只取了最大的为 ``None``。"""
        return self.arrays.get(LOGITS)

    @property
    def ids(self) -> np.ndarray:
        """``[B, L]`` int64，每个位置 logit 最大的 token，并列取较小的。"""
        found = self.arrays[BEST_ID][..., 0] if self.logits is None else self.logits.argmax(axis=2)
        return found.astype(np.int64, copy=False)

    @property
    def peaks(self) -> np.ndarray:
        """``[B, L]``，最大的 logit；logits 里有 NaN 就不是有限的数。"""
        return self.arrays[BEST_LOGIT][..., 0] if self.logits is None else self.logits.max(axis=2)

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Scores:
        """每个数组各换成 ``change(数组)``。"""
        return Scores({name: change(array) for name, array in self.arrays.items()})

    def put(self, rows: np.ndarray, other: Scores) -> None:
        """``rows`` ``[B]`` bool 里的行换成 ``other`` 的；两个取的是同样的输出。"""
        for name, array in self.arrays.items():
            array[rows] = other.arrays[name][rows]


def wanted_outputs(contract: GraphContract, want_logits: bool) -> tuple[str, ...]:
    """一次前向为了分数要取回哪些输出。

    Args:
        contract: 图的约定。
        want_logits: 要不要 logits；不要而图选不出最大的，也只好取。
    """
    return BEST if not want_logits and set(BEST) <= contract.outputs.keys() else (LOGITS,)
