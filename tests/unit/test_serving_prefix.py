"""前缀树与逐个比较的结果相同，插入、删除的次序怎样都行。"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.serving import prefix
from deepseek_export.serving.prefix import PrefixTree, common_prefix

pytestmark = pytest.mark.unit

tokens = st.lists(st.integers(0, 2), max_size=9).map(lambda ids: np.array(ids, np.int64))


@given(one=tokens, two=tokens)
def test_common_prefix(one: np.ndarray, two: np.ndarray) -> None:
    same = common_prefix(one, two)
    assert one[:same].tolist() == two[:same].tolist()
    assert same == min(len(one), len(two)) or one[same] != two[same]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), tokens, st.booleans()), max_size=16), tokens)
def test_longest_equals_comparing_with_each(steps, wanted) -> None:
    tree: PrefixTree[int] = PrefixTree()
    kept: dict[int, tuple[str, np.ndarray]] = {}
    for item, (salt, ids, drop) in enumerate(steps):
        if drop and kept:
            gone = sorted(kept)[len(ids) % len(kept)]
            tree.remove(*kept.pop(gone), gone)
        else:
            tree.insert(salt, ids, item)
            kept[item] = salt, ids
        for salt_wanted in "abc":
            lengths = {
                one: common_prefix(ids, wanted) for one, (salt, ids) in kept.items() if salt == salt_wanted
            }
            best = max(lengths.values(), default=0)
            length, found = tree.longest(salt_wanted, wanted)
            assert length == best
            if best:
                assert found == [one for one, same in lengths.items() if same == best]


def test_edges_are_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """一条长的序列被许多短的断开过，短的走了之后仍是一条边：查一次只比一段。"""
    tree: PrefixTree[str] = PrefixTree()
    long = np.arange(1000)
    tree.insert("", long, "long")
    for at in range(1, 1000, 7):
        short = np.append(long[:at], 5000)
        tree.insert("", short, "short")
        tree.remove("", short, "short")
    pieces: list[int] = []
    monkeypatch.setattr(prefix, "common_prefix", lambda one, two: pieces.append(len(one)) or len(one))
    assert tree.longest("", long) == (1000, ["long"])
    assert pieces == [1000]
