"""一批输出：逐行收 token，在 eos 或长度上限处截断。"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from deepseek_export.runtime.result import FinishReason

OnToken = Callable[[int, int], None]


class OutputRows:
    """普通解码与投机解码共用的截断规则，所以两者的输出在同样的 token 处结束。

    Args:
        budgets: ``[B]``，每行至多多少个 token，可以为 0。
        eos: 任何一个都结束一行；它自己算在输出里。
        on_token: 每收一个 token 调一次 ``on_token(row, token)``。

    Attributes:
        token_ids: 每行收到的 token。
        reasons: 每行为什么结束。
        active: ``[B]`` bool，还没有结束的行。
        remaining: ``[B]`` int64，每行还能收几个。
    """

    def __init__(self, budgets: np.ndarray, eos: frozenset[int], on_token: OnToken | None) -> None:
        self._eos = eos
        self._on_token = on_token
        self.token_ids: list[list[int]] = [[] for _ in budgets]
        self.reasons: list[FinishReason] = ["length"] * len(budgets)
        self.active = budgets > 0
        self.remaining = budgets.astype(np.int64)

    def emit(self, row: int, tokens: Iterable[int]) -> int:
        """给还没结束的一行依次添上 ``tokens``，到它结束为止；返回收下了几个。"""
        taken = 0
        for token in tokens:
            taken += 1
            self.token_ids[row].append(token)
            self.remaining[row] -= 1
            if self._on_token is not None:
                self._on_token(row, token)
            if token in self._eos:
                self.reasons[row] = "eos"
            self.active[row] = token not in self._eos and self.remaining[row] > 0
            if not self.active[row]:
                break
        return taken
