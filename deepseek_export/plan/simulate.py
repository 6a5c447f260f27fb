"""流水线的离散事件模拟：小批沿环走过各站，每一站占着一个资源，先到的先做。

与 :mod:`deepseek_export.cluster` 走的一样：一步的各个小批依次进环，在环里的不超过 ``window`` 个，全部回来才有下一步。没有随机数，没有真的时钟：
同样的输入得到同样的秒数。
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Work:
    """一个小批。

    Attributes:
        rows: 几条序列。
        tokens: 新的 token，各条合计。
        depth: 已在缓存里的 token，各条合计。
    """

    rows: int
    tokens: int
    depth: int


@dataclass(frozen=True)
class Station:
    """环上的一站：一个 stage，或一条边。

    Attributes:
        resource: 占着哪个资源；几站可以占同一个（几个 stage 在一个核上）。
        seconds: 一个小批占它多久。
        latency: 做完之后过多久到下一站，这段时间不占资源。
    """

    resource: str
    seconds: Callable[[Work], float]
    latency: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """模拟的结果。

    Attributes:
        ends: 每一步的小批都回来了的时刻，秒，从 0 起。
        busy: 每个资源一共忙了多久。
    """

    ends: tuple[float, ...]
    busy: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """一共多久。"""
        return self.ends[-1]


def simulate(route: Sequence[Station], steps: Sequence[Sequence[Work]], window: int) -> Outcome:
    """让每一步的小批走完 ``route``。

    Args:
        route: 环上的各站，按先后。
        steps: 每一步的小批；一步都回来了才开始下一步。
        window: 在环里的至多几个；先进去的先回来，腾出一个进一个。
    """
    ends: list[float] = []
    busy: dict[str, float] = {}
    free: dict[str, float] = {}
    for works in steps:
        now = ends[-1] if ends else 0.0
        ends.append(_step(route, works, window, now, free, busy))
    return Outcome(tuple(ends), busy)


def _step(
    route: Sequence[Station],
    works: Sequence[Work],
    window: int,
    now: float,
    free: dict[str, float],
    busy: dict[str, float],
) -> float:
    """一步；返回最后一个回来的时刻。事件是「第几个小批到了第几站」，同时到的，先进环的先做。"""
    events = [(now, number, 0) for number in range(min(window, len(works)))]
    entered = len(events)
    last = now
    while events:
        now, number, place = heapq.heappop(events)
        if place < len(route):
            station = route[place]
            seconds = station.seconds(works[number])
            done = max(now, free.get(station.resource, 0.0)) + seconds
            free[station.resource] = done
            busy[station.resource] = busy.get(station.resource, 0.0) + seconds
            heapq.heappush(events, (done + station.latency, number, place + 1))
            continue
        last = now
        if entered < len(works):
            heapq.heappush(events, (now, entered, 0))
            entered += 1
    return last


def ragged_steps(
    rows: int, parts: int, count: int, lengths: tuple[int, int], seed: int = 0
) -> list[list[Work]]:
    """``count`` 步解码，各条长短不一。

    每条从 ``lengths`` 之间的一个长度起，每步长一个；满了就换成刚算完提示词的下一条（提示词的时间不算在内）。分成小批的办法同
    :class:`~deepseek_export.cluster.runner.PipelineRunner`：连着的几条一批，前面的批多一条。

    Args:
        rows: 几条序列。
        parts: 分成几个小批，不超过 ``rows``。
        count: 几步。
        lengths: 刚算完提示词时、写满时各多长。
        seed: 长度的种子。
    """
    low, high = lengths
    choose = random.Random(seed)
    depths = [choose.randrange(low, high) for _ in range(rows)]
    each, more = divmod(rows, parts)
    edges = [0]
    for part in range(parts):
        edges.append(edges[-1] + each + (part < more))
    steps = []
    for _ in range(count):
        steps.append(
            [Work(end - begin, end - begin, sum(depths[begin:end])) for begin, end in pairwise(edges)]
        )
        depths = [depth + 1 if depth + 1 < high else low for depth in depths]
    return steps


def chunked_prompt(tokens: int, chunk: int) -> list[list[Work]]:
    """一条提示词，一步一块。"""
    return [[Work(1, min(chunk, tokens - begin), begin)] for begin in range(0, tokens, chunk)]
