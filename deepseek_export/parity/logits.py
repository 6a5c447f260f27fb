"""整个模型的 logits 怎么比：路由在近平局处分叉之后的行单独算。"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepseek_export.parity.measures import measure
from deepseek_export.parity.report import Case, Level, compare
from deepseek_export.parity.tolerances import ROUTER_MARGIN, Dtype, Key, tolerance


def logits_cases(
    level: Level, name: str, key: Key, got: np.ndarray, want: np.ndarray, margin: np.ndarray, router: Dtype
) -> Iterator[Case]:
    """比一批行；超差的行若在路由近平局之后，从那一行起单独比、单独计数，其余行仍按 ``key`` 要求。

    Args:
        level, name: 报告里的层级与名字。
        key: 容差的键。
        got, want: [..., S, V]。
        margin: [..., S]，路由离换一个专家有多远。
        router: 近平局判据的 dtype，见 :func:`~deepseek_export.parity.keys.router_dtype`。
    """
    case = compare(level, name, key, got, want)
    if case.passed or case.measure is None:
        yield case
        return
    limit = tolerance(*key).limit(measure(got, want).scale)
    wrong = ~(np.abs(got.astype(np.float64) - want).max(-1) <= limit)
    # 因果：近平局只影响它自己和它之后的行
    forked = np.logical_or.accumulate(
        wrong & np.logical_or.accumulate(margin < ROUTER_MARGIN[router], -1), -1
    )
    if not forked.any():
        yield case
        return
    if not forked.all():
        yield compare(level, name, key, got[~forked], want[~forked])
    loose = compare(level, name, ("logits_after_near_tie", router, None), got[forked], want[forked])
    loose.near_ties = int(forked.sum())
    first = int(np.argwhere(forked)[0][-1])
    loose.note = f"第 {first} 个 token 起路由近平局；{loose.note}".rstrip("；")
    yield loose
