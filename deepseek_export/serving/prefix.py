"""前缀树：token 序列 → 谁持有它；找出与一条新序列公共前缀最长的持有者。

压缩的基数树：一条边是一段 token，每个结点记着哪些序列走完了这条边。查找、插入、删除都只走一遍这条序列，与树里有多少条无关。
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)


class _Node(Generic[Item]):
    """一条边连同它的下端；``items`` 里的序列都走完了这条边，按插入的次序。"""

    def __init__(self, label: np.ndarray, items: dict[Item, None]) -> None:
        self.label, self.items = label, items
        self.children: dict[int, _Node[Item]] = {}


class PrefixTree(Generic[Item]):
    """逐个 ``salt`` 一棵树，互相看不见。"""

    def __init__(self) -> None:
        self._roots: dict[str, _Node[Item]] = {}

    def insert(self, salt: str, tokens: np.ndarray, item: Item) -> None:
        """``item`` 持有 ``tokens`` ``[n]``；它不能已经在树里。"""
        node = self._roots.setdefault(salt, _Node(tokens[:0], {}))
        node.items[item] = None
        at = 0
        while at < len(tokens):
            first = int(tokens[at])
            child = node.children.get(first)
            if child is None:
                node.children[first] = _Node(tokens[at:], {item: None})
                return
            shared = common_prefix(child.label, tokens[at:])
            if shared < len(child.label):
                child = node.children[first] = _split(child, shared)
            child.items[item] = None
            node = child
            at += shared

    def remove(self, salt: str, tokens: np.ndarray, item: Item) -> None:
        """忘掉 ``item``；``tokens`` 与插入时的相同。"""
        node = self._roots[salt]
        del node.items[item]
        if not node.items:
            del self._roots[salt]
            return
        at, path = 0, list[_Node[Item]]()
        while at < len(tokens):
            first = int(tokens[at])
            child = node.children[first]
            del child.items[item]
            if not child.items:  # 子孙的序列都经过这里，也都空了
                del node.children[first]
                break
            path.append(child)
            node = child
            at += len(child.label)
        for node in path:
            _rejoin(node)

    def longest(self, salt: str, tokens: np.ndarray) -> tuple[int, list[Item]]:
        """``(公共前缀的最大长度, 有这么长公共前缀的持有者)``；一个也没有为 ``(0, [])``。"""
        node = self._roots.get(salt)
        at, found = 0, list[Item]()
        while node is not None and at < len(tokens):
            node = node.children.get(int(tokens[at]))
            if node is not None:
                shared = common_prefix(node.label, tokens[at:])
                at, found = at + shared, list(node.items)
                if shared < len(node.label):
                    break
        return at, found


def common_prefix(one: np.ndarray, two: np.ndarray) -> int:
    """两个一维数组的公共前缀有多长。"""
    size = min(len(one), len(two))
    different = one[:size] != two[:size]
    first = int(different.argmax()) if size else 0
    return first if size and different[first] else size


def _split(node: _Node[Item], at: int) -> _Node[Item]:
    """把一条边在 ``at`` 处断开；返回上半截。"""
    upper = _Node(node.label[:at], dict(node.items))
    node.label = node.label[at:]
    upper.children[int(node.label[0])] = node
    return upper


def _rejoin(node: _Node[Item]) -> None:
    """断开过的边，又只剩一条路了就接回去；否则树会越来越碎。"""
    while len(node.children) == 1:
        (child,) = node.children.values()
        if len(child.items) != len(node.items):  # 有的序列到这里为止
            break
        node.label = np.concatenate([node.label, child.label])
        node.children = child.children
