"""投机解码的统计。"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SpeculationStats:
    """一次生成里投机解码的表现；只算 decode，不算 prefill。

    一行在一次主模型调用里算一个「行次」，已结束的行不算；被 eos 或长度截掉的草稿也不算。

    Attributes:
        num_draft_tokens: 每次至多几个草稿。
        verify: 验证方式。
        acceptance: 第 i 个草稿的条件接受率：前 i 个都被接受之后，它被接受的比例；从未轮到为 ``None``。
        acceptance_overall: 第 i 个草稿的总接受率：提出之后被接受的比例；从未提出为 ``None``。
        mean_accepted: 每个带草稿的行次平均接受几个草稿。
        tokens_per_call: 每个行次平均产出几个 token；普通解码是 1。
        main_calls: 主模型调用次数。
        draft_calls: 草稿模型调用次数。
        fell_back: 是否有行因为不划算而中途改回普通解码。
    """

    num_draft_tokens: int
    verify: str
    acceptance: list[float | None]
    acceptance_overall: list[float | None]
    mean_accepted: float
    tokens_per_call: float
    main_calls: int
    draft_calls: int
    fell_back: bool

    def as_dict(self) -> dict[str, Any]:
        """可以直接写成 JSON 的字典。"""
        return asdict(self)


class Tally:
    """一边解码一边累计，最后给出 :class:`SpeculationStats`。"""

    def __init__(self, num_draft_tokens: int, verify: str) -> None:
        self._verify = verify
        self._proposed = np.zeros(num_draft_tokens, np.int64)
        self._reached = np.zeros(num_draft_tokens, np.int64)
        self._accepted = np.zeros(num_draft_tokens, np.int64)
        self._drafted_rows = 0
        self._rows = 0
        self._tokens = 0
        self.main_calls = 0

    def add(self, proposed: int, accepted: int, tokens: int) -> None:
        """记一个行次：提出几个草稿、接受几个、产出几个 token。"""
        self._rows += 1
        self._tokens += tokens
        if proposed:
            self._drafted_rows += 1
            self._proposed[:proposed] += 1
            self._reached[: min(accepted + 1, proposed)] += 1
            self._accepted[:accepted] += 1

    def stats(self, draft_calls: int, fell_back: bool) -> SpeculationStats:
        """汇总。"""
        return SpeculationStats(
            num_draft_tokens=len(self._proposed),
            verify=self._verify,
            acceptance=_ratios(self._accepted, self._reached),
            acceptance_overall=_ratios(self._accepted, self._proposed),
            mean_accepted=int(self._accepted.sum()) / max(self._drafted_rows, 1),
            tokens_per_call=self._tokens / max(self._rows, 1),
            main_calls=self.main_calls,
            draft_calls=draft_calls,
            fell_back=fell_back,
        )


def _ratios(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]
