"""符号尺寸上的整数算式：网格、workspace 偏移、kernel 的整数参数都写成它。

同一个算式要在三处求值：这里、Python 插件、C++ 插件（``plugins/tensorrt``）。所以它保存成逆波兰记号，文本形式就是空格分开的
记号，求值只需要一个栈。
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: 记号 → 二元运算；C++ 一侧的同一张表在 ``plugins/tensorrt/program.cc``。除法都是非负整数的除法。
OPERATORS: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "+": operator.add,
        "*": operator.mul,
        "/": operator.floordiv,
        "ceil": lambda a, b: -(-a // b),
        "min": min,
        "max": max,
        "<=": lambda a, b: int(a <= b),
    }
)


@dataclass(frozen=True, slots=True)
class Expression:
    """一个算式；用 :func:`symbol` 与整数运算拼出来。

    Attributes:
        tokens: 逆波兰记号：非负整数、符号名、:data:`OPERATORS` 的键。
    """

    tokens: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Expression:
        """``str(expression)`` 的逆。"""
        return cls(tuple(text.split()))

    @classmethod
    def of(cls, value: Size) -> Expression:
        """整数 → 常数算式；算式原样返回。"""
        return value if isinstance(value, Expression) else cls((str(value),))

    def __str__(self) -> str:
        return " ".join(self.tokens)

    def __add__(self, other: Size) -> Expression:
        return self._combine(other, "+")

    def __mul__(self, other: Size) -> Expression:
        return self._combine(other, "*")

    def __floordiv__(self, other: Size) -> Expression:
        return self._combine(other, "/")

    def ceil(self, other: Size) -> Expression:
        """除以 ``other``，向上取整。"""
        return self._combine(other, "ceil")

    def min(self, other: Size) -> Expression:
        """两者中较小的。"""
        return self._combine(other, "min")

    def max(self, other: Size) -> Expression:
        """两者中较大的。"""
        return self._combine(other, "max")

    def at_most(self, other: Size) -> Expression:
        """不大于 ``other`` 时为 1，否则为 0。"""
        return self._combine(other, "<=")

    def align(self, unit: int) -> Expression:
        """向上凑整到 ``unit`` 的倍数。"""
        return self.ceil(unit) * unit

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """代入符号的值。

        Raises:
            KeyError: 有符号没有值（dsx 的缺陷）。
        """
        stack: list[int] = []
        for token in self.tokens:
            if token in OPERATORS:
                right = stack.pop()
                stack.append(OPERATORS[token](stack.pop(), right))
            else:
                stack.append(int(token) if token.isdigit() else sizes[token])
        (value,) = stack
        return value

    def _combine(self, other: Size, sign: str) -> Expression:
        return Expression((*self.tokens, *Expression.of(other).tokens, sign))


Size = int | Expression


def symbol(name: str) -> Expression:
    """一个符号尺寸，例如 ``B``。"""
    return Expression((name,))
