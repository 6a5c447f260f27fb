"""把各层分成连着的几段，最重的一段尽量轻；重量是字节还是时间，由调用方定。"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate

#: 一段的 ``[begin, end)``。
Span = tuple[int, int]
_NEVER = float("inf")


def balanced(
    layers: Sequence[float],
    first: float,
    last: float,
    stages: int,
    fits: Callable[[Span], bool] = lambda span: True,
) -> list[Span]:
    """最重的一段尽量轻，其次各段尽量一样重。

    Args:
        layers: 每层的重量。
        first, last: 另加在第一段、最后一段上的（词嵌入；输出头与草稿模块）。
        stages: 几段，不超过层数。
        fits: 这一段放不放得下；放不下的不用。

    Returns:
        每段的 ``[begin, end)``；怎么分都放不下的是空的。
    """
    count = len(layers)
    before = [0, *accumulate(layers)]

    def load(begin: int, end: int) -> float:
        ends = (first if begin == 0 else 0) + (last if end == count else 0)
        return before[end] - before[begin] + ends if fits((begin, end)) else _NEVER

    loads = {(begin, end): load(begin, end) for begin in range(count) for end in range(begin + 1, count + 1)}
    largest, _ = _best(loads, count, stages, max)
    if largest == _NEVER:
        return []
    squares = {span: float(weight) ** 2 if weight <= largest else _NEVER for span, weight in loads.items()}
    return _best(squares, count, stages, operator.add)[1]


def _best(
    weights: dict[Span, float], count: int, stages: int, join: Callable[[float, float], float]
) -> tuple[float, list[Span]]:
    """各段的重量用 ``join`` 合起来最小的分法；逐段递推，只留每一步从哪里来。"""
    cost = [_NEVER] + [weights[0, end] for end in range(1, count + 1)]
    origins = []
    for stage in range(1, stages):
        found, origin = [_NEVER] * (count + 1), [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            found[end], origin[end] = min(
                (join(cost[begin], weights[begin, end]), begin) for begin in range(stage, end)
            )
        cost = found
        origins.append(origin)
    spans, end = [], count
    for origin in reversed(origins):
        spans.append((origin[end], end))
        end = origin[end]
    return cost[count], [(0, end), *reversed(spans)]


def fewest(layers: Sequence[float], first: float, last: float, limit: float) -> int | None:
    """每段不超过 ``limit`` 至少要几段；有一层自己就超过的没有。"""
    count, held = 0, _NEVER
    for index, weight in enumerate(layers):
        weight += (first if index == 0 else 0) + (last if index == len(layers) - 1 else 0)
        if weight > limit:
            return None
        held += weight
        if held > limit:
            count, held = count + 1, weight
    return count
