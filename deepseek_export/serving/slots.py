"""槽：缓存的一行，从外面看。"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_export.errors import DsxError


@dataclass(frozen=True)
class SlotState:
    """一个槽现在怎样。

    Attributes:
        id: 编号；内容搬到别的行，编号跟着走。
        tokens: 缓存里有几个 token。
        busy: 正有请求在用；不在用而有 token 的，只为前缀留着。
    """

    id: int
    tokens: int
    busy: bool


def slot_refused(slot: object, why: str) -> DsxError:
    """一个槽现在不能这样用（``DSX-E534``）。"""
    return DsxError("DSX-E534", f"槽 {slot} {why}", "Engine.slots() 列出每个槽；换一个，或等它闲下来")
