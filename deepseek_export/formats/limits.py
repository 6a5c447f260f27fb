"""语法编译之前的限额。llguidance 自己的限额管不住这几样：几千层的规则、``$ref`` 会让它递归到栈溢出，整个进程就没了；
很长的正则、几千个可有可无的属性，用时是长度的平方。
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepseek_export.errors import DsxError

#: 整个语法、手写的 Lark、一个正则（也是 Lark 的一行）至多多少个字符。
MAX_LENGTH, MAX_LARK, MAX_REGEX = 256 << 10, 16 << 10, 4096
#: 手写的 Lark 里规则与括号一共至多几个：规则一个接一个，括号一层套一层，都是递归。
MAX_RULES = 800
#: JSON Schema 至多几层（连 ``$ref`` 指过去的），一个 object 至多几个属性，``pattern`` 一共多长。
MAX_DEPTH, MAX_PROPERTIES, MAX_PATTERNS = 150, 1000, 16 << 10

_NESTING = re.compile(r"^\s*[!?]?\w+[^:\n]*:|[(\[]", re.MULTILINE)


def check_length(grammar: str) -> None:
    """整个语法的长度。

    Raises:
        DsxError: ``DSX-E760``。
    """
    _limit("语法的长度", len(grammar), MAX_LENGTH)


def check_lark(lark: str) -> None:
    """手写的 Lark。

    Raises:
        DsxError: ``DSX-E760``，太长，规则与括号太多，或有一行太长。
    """
    _limit("Lark 的长度", len(lark), MAX_LARK)
    _limit("Lark 里规则与括号的个数", len(_NESTING.findall(lark)), MAX_RULES)
    _limit("Lark 里一行的长度", max(map(len, lark.splitlines()), default=0), MAX_REGEX)


def check_regex(regex: str) -> None:
    """一个正则。

    Raises:
        DsxError: ``DSX-E760``，太长。
    """
    _limit("正则的长度", len(regex), MAX_REGEX)


def check_schema(schema: Any) -> None:
    """一个 JSON Schema。

    Raises:
        DsxError: ``DSX-E760``，嵌得太深，属性太多，或 ``pattern`` 太长。
    """
    walk = _Walk(schema)
    try:
        walk.depth(schema)
    except RecursionError:
        _limit("schema 的层数", MAX_DEPTH + 1, MAX_DEPTH)
    _limit("schema 里 pattern 的总长", walk.patterns, MAX_PATTERNS)


class _Walk:
    """走一遍 schema，指到哪里走到哪里，每处只走一次。"""

    def __init__(self, root: Any) -> None:
        self.patterns = 0
        self._root = root
        self._depths: dict[int, int] = {}

    def depth(self, node: Any, above: int = 0) -> int:
        """``node`` 以下有几层；指回上面的不再算。"""
        if not isinstance(node, (dict, list)):
            return 0
        if id(node) in self._depths:
            below = self._depths[id(node)]
        else:
            self._depths[id(node)] = 0  # 还在走：指回来的不再走
            _limit("schema 的层数", above, MAX_DEPTH)
            below = max((self.depth(one, above + 1) for one in self._inside(node)), default=0) + 1
            self._depths[id(node)] = below
        _limit("schema 的层数", above + below, MAX_DEPTH)
        return below

    def _inside(self, node: dict[str, Any] | list[Any]) -> list[Any]:
        if isinstance(node, list):
            return node
        pattern, properties = node.get("pattern"), node.get("properties")
        if isinstance(pattern, str):
            check_regex(pattern)
            self.patterns += len(pattern)
        if isinstance(properties, dict):
            _limit("一个 object 的属性个数", len(properties), MAX_PROPERTIES)
        return [*node.values(), self._target(node.get("$ref"))]

    def _target(self, reference: Any) -> Any:
        found = self._root
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def _limit(what: str, value: int, most: int) -> None:
    if value > most:
        raise DsxError("DSX-E760", f"{what}至多 {most:,}，这里是 {value:,}", "写得简单些，或拆成几个请求")
