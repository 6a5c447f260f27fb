"""路由近平局之后的行怎么比：``parity/logits.py``。"""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_export.parity.logits import logits_cases
from deepseek_export.parity.tolerances import ROUTER_MARGIN, Key

KEY: Key = ("logits_narrow_cache", "bfloat16", None)
ROWS = 40


def run(wrong: list[int], near: list[int], error: float = 0.3):
    """``wrong`` 的行差 ``error``，``near`` 的行路由近平局。"""
    want = np.random.default_rng(0).standard_normal((ROWS, 50)).astype(np.float32)
    got, margin = want.copy(), np.full(ROWS, 1.0, np.float32)
    got[wrong] += error * np.sign(want[wrong])
    margin[near] = ROUTER_MARGIN["bfloat16"] / 2
    return list(logits_cases("model", "x", KEY, got, want, margin, "bfloat16"))


def test_within_tolerance_nothing_is_set_apart():
    """近平局而没有超差的行不单独计。"""
    (case,) = run([], [3])
    assert case.passed
    assert case.near_ties == 0


def test_only_rows_from_the_first_fork_on_are_excused():
    """近平局在前、超差在后：从超差那一行起单独比，前面的仍按原来的容差。"""
    strict, loose = run([10, 11, 12], [8])
    assert (strict.passed, strict.tolerance.max_abs) == (True, 4e-2)
    assert (loose.passed, loose.near_ties) == (True, ROWS - 10)
    assert "第 10 个 token" in loose.note


@pytest.mark.parametrize("near", [[], [11]], ids=["nowhere", "later"])
def test_a_wrong_row_before_any_near_tie_fails(near: list[int]):
    """超差的行之前没有近平局：不是分叉，是错误。"""
    assert not run([10], near)[0].passed


def test_gross_errors_fail_even_after_a_fork():
    """分叉之后也不能整体跑偏。"""
    *_, loose = run(list(range(10, ROWS)), [8], error=3.0)
    assert not loose.passed
