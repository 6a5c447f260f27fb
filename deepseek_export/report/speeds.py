"""``dsx plan`` 的两处共用：切法的名字，速度的写法。"""

from __future__ import annotations

import math

SPLITS = {"single": "单卡", "tensor": "张量并行", "expert": "专家并行", "pipeline": "流水并行"}


def speed(value: float | None) -> str:
    """上界只知道两位：往上取，「不超过」才仍然成立；不到 1 的也写得出。"""
    if value is None:
        return "放不下"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1.0
    rounded = math.ceil(value / unit * (1 - 1e-12)) * unit
    return f"{rounded:,.0f} token/s" if unit >= 1 else f"{rounded:.2g} token/s"
