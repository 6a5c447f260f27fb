"""带单位的数：命令行与报错共用。"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

#: 字节数的单位，小写：``GiB`` 是二进制的，``GB`` 是十进制的，与厂商写内存的相同。
_BYTES: Mapping[str, int] = MappingProxyType(
    {"": 1, "b": 1}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
    | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
)


def size(count: float) -> str:
    """字节数，二进制单位，三位有效数字：``549 MiB``、``38.1 GiB``。"""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    if unit == "B":
        return f"{count:.0f} B"
    digits = 2 if count < 10 else 1 if count < 100 else 0
    return f"{count:.{digits}f} {unit}"


def parse_size(text: str) -> int | None:
    """``2GiB``、``500 MB``、``1048576`` → 字节数；不是这样写的为 ``None``。大小写随意，小数向下取整。"""
    found = re.fullmatch(r"\s*(\d{1,18})(\.\d{1,9})?\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    factor = _BYTES.get(found[3].lower()) if found else None
    if found is None or factor is None:
        return None
    return int(found[1]) * factor + int(float(found[2] or 0) * factor)


def gigabytes(per_second: float) -> str:
    """每秒的字节数，十进制：``28.4 GB/s``，与内存带宽的写法相同。"""
    return f"{per_second / 1e9:.3g} GB/s"
