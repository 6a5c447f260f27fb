"""带单位的数：命令行与报错共用。"""

from __future__ import annotations


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


def gigabytes(per_second: float) -> str:
    """每秒的字节数，十进制：``28.4 GB/s``，与内存带宽的写法相同。"""
    return f"{per_second / 1e9:.3g} GB/s"
