"""服务引擎的止损线：每种批大小各量各的，投机不比普通解码快就先不投机，过一阵再比。

什么时候投机不改变任何一个 token，只改变快慢，所以可以看时间。
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

#: 头一次比较之前走几步；比较时另一种走几步；至多隔几步比一次。
_WINDOW, _PROBE, _LONGEST = 16, 4, 1024


class _Step(NamedTuple):
    tokens: int
    seconds: float


class _Contest:
    """一种批大小：两种走法，赢了的接着走，隔得越来越远地再比。"""

    def __init__(self) -> None:
        self.drafting = True  # 赢了的那一种
        self._until = _WINDOW
        self._taken = 0  # 赢了的那一种走了几步
        self._steps = {way: deque[_Step](maxlen=_WINDOW) for way in (True, False)}

    @property
    def next(self) -> bool:
        """下一步起草不起草。"""
        return self.drafting if self._taken < self._until else not self.drafting

    def add(self, drafted: bool, step: _Step) -> None:
        self._steps[drafted].append(step)
        if drafted == self.drafting:
            self._taken += 1
            return
        challenger, champion = self._steps[drafted], self._steps[not drafted]
        if len(challenger) < _PROBE or self._taken < self._until:
            return
        self._taken = 0
        if _seconds_per_token(challenger) < _seconds_per_token(champion):
            self.drafting, self._until = drafted, _WINDOW
        else:
            self._until = min(2 * self._until, _LONGEST)
        challenger.clear()
        champion.clear()


class BatchFloor:
    """照着用时决定每一步投机不投机；一个引擎一个。"""

    def __init__(self) -> None:
        self._contests: dict[int, _Contest] = {}

    def wants(self, rows: int) -> bool:
        """``rows`` 行的下一步要不要投机。"""
        return self._contests.setdefault(rows, _Contest()).next

    def add(self, rows: int, drafted: bool, tokens: int, seconds: float) -> None:
        """记下一步。

        Args:
            rows: 几行。
            drafted: 起草了没有。
            tokens: 一共给出几个 token。
            seconds: 用时，起草的也算。
        """
        self._contests.setdefault(rows, _Contest()).add(drafted, _Step(tokens, seconds))


def _seconds_per_token(steps: deque[_Step]) -> float:
    """用时取中位数：刚换形状的头一步要分配缓冲区，不该算进去。"""
    seconds = statistics.median(step.seconds for step in steps)
    return seconds * len(steps) / max(sum(step.tokens for step in steps), 1)
