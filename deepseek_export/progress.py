"""进度的汇报接口；怎么显示由命令行决定（rich 进度条、纯文本或不显示）。"""

from __future__ import annotations

from typing import Literal

Unit = Literal["items", "bytes"]


class Progress:
    """不显示任何东西的进度；也是各种显示方式的基类。"""

    def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
        """进入一个阶段。

        Args:
            stage: 阶段名（中文）。
            total: 总量；``None`` 表示未知。
            unit: 总量与 ``advance`` 的单位。
        """

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """当前阶段前进 ``amount``；``detail`` 是正在处理的东西（张量名、层名）。"""

    def note(self, line: str) -> None:
        """一行必须让用户看到的话，例如回退的原因。"""
