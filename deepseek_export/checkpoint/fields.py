"""从不可信的 JSON 对象里逐个取字段：类型、范围、缺失，各有各的错误码。"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_export.errors import DsxError

MAX_DIM = 1 << 24
#: 配置、索引与文件头最深不过五六层；再深的是故意的，比较、打印时会爆栈。
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Fields:
    """一个 JSON 对象加上它的来源。

    Attributes:
        data: 键值；布尔绝不当整数用，NaN、Inf 与过大的数一律拒绝。
        where: 来源，写进报错。
    """

    data: Mapping[str, Any]
    where: str

    def bad(self, key: str, want: str, code: str = "DSX-E105") -> DsxError:
        """造一个“取值不支持”的错误，带上字段名和值。"""
        return DsxError(code, f"{self.where} 的 {key} 是 {shown(self.data.get(key))}", f"{key} 应为{want}")

    def require(self, key: str) -> Any:
        """取必需的字段；缺失抛 ``DSX-E106``（值可以是 null）。"""
        if key not in self.data:
            todo = "补上该字段；dsx 不替架构字段猜缺省值"
            raise DsxError("DSX-E106", f"{self.where} 缺少 {key}", todo)
        return self.data[key]

    def refuse_unknown(self, known: Collection[str], code: str = "DSX-E104") -> None:
        """有不在 ``known`` 里、值又不是 null 的键就拒绝，并点名第一个；null 就是没有写。"""
        for key in sorted(key for key in set(self.data) - set(known) if self.data[key] is not None):
            todo = "dsx 不知道它会不会改变推理结果，所以不敢忽略；确认无关后请从配置里删掉，或提交 issue"
            raise DsxError(code, f"{self.where} 里有未知字段 {shown(key)} = {shown(self.data[key])}", todo)

    def must_equal(self, key: str, *allowed: Any, code: str = "DSX-E105") -> None:
        """字段缺失、为 null 或等于某个允许的值才放行；``True`` 与 ``1`` 不算相等。"""
        value = self.data.get(key)
        if value is None or any(
            value == only and isinstance(value, bool) == isinstance(only, bool) for only in allowed
        ):
            return
        raise self.bad(key, " " + " 或 ".join(repr(only) for only in allowed), code)

    def integer(self, key: str, *, low: int = 1, high: int = MAX_DIM, code: str = "DSX-E105") -> int:
        """必需的整数，范围 ``[low, high]``。"""
        value = self.require(key)
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key, f" {low} 到 {high} 的整数", code)
        return value

    def optional_integer(
        self, key: str, *, low: int = 0, high: int = MAX_DIM, required: bool = False
    ) -> int | None:
        """可以为 null 的整数；``required`` 时键必须在。"""
        value = self.require(key) if required else self.data.get(key)
        return None if value is None else self.integer(key, low=low, high=high)

    def number(self, key: str, code: str) -> float | None:
        """可缺失、可为 null 的非负有限数。"""
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e30:
            raise self.bad(key, "有限的非负数", code)
        return float(value)

    def positive(self, key: str, *, above: float = 0.0, code: str = "DSX-E105") -> float:
        """必需的有限数，严格大于 ``above``。"""
        self.require(key)
        value = self.number(key, code)
        if value is None or not math.isfinite(value) or value <= above:
            raise self.bad(key, f"大于 {above:g} 的有限数", code)
        return value

    def boolean(self, key: str, *, default: bool | None = None, code: str = "DSX-E105") -> bool:
        """布尔；没有 ``default`` 时必需。"""
        value = self.require(key) if default is None else self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, " true 或 false", code)
        return value

    def choice(
        self, key: str, options: Collection[str], default: str | None = None, code: str = "DSX-E105"
    ) -> str:
        """枚举字符串；没有 ``default`` 时必需，有 ``default`` 时 null 等同缺失。"""
        value = self.require(key) if default is None else self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in options:
            raise self.bad(key, f" {' / '.join(options)}", code)
        return value


def shown(value: Any) -> str:
    """不可信的值写进一行报错里的样子：太长的、太深的从中间省略。"""
    if isinstance(value, str) and value.isidentifier() and len(value) <= 80:
        return value
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist = 3, 4, 8
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80


def parse_json(text: str) -> Any:
    """不可信的 JSON。

    Raises:
        ValueError: 语法不对、键重复，或嵌套太深。
    """
    try:
        data = json.loads(text, object_pairs_hook=unique_object)
    except RecursionError as error:
        raise ValueError("嵌套太深") from error
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _children(value)]
        if not level:
            return data
    raise ValueError(f"嵌套超过 {_MAX_DEPTH} 层")


def _children(value: Any) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``json.loads`` 的 ``object_pairs_hook``：键重复抛 ``ValueError``。"""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"键 {twice!r} 重复")
    return result
