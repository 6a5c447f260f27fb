"""采样的随机数：只由（种子，token 的位置，用途）决定，与同批还有谁、一次走几步、跑了几轮都无关。

用计数器式的发生器 Philox：种子定密钥，位置当计数器，取任何一个数都不必先取它前面的。一条序列因此单独跑、与别人同批、
中途换到另一行、从中间接着跑，用的都是同一些随机数。
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """一个位置上的随机数各作什么用；一个位置给四个，次序不能变。"""

    NEXT = 0  # 从主模型的分布里选 token
    DRAFT = 1  # 从草稿模型的分布里抽草稿
    ACCEPT = 2  # 接不接受草稿


#: Philox 每加一次计数给四个 64 位数。
_BLOCK = 4


class RowStream:
    """一条序列的随机数。

    Args:
        seed: 不小于 0 的整数，多大都行；``None`` 取操作系统的随机数，每次不同。
    """

    def __init__(self, seed: int | None) -> None:
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)

    def uniforms(self, use: Use, position: int, count: int = 1) -> np.ndarray:
        """``position`` 起连续 ``count`` 个位置上、用途为 ``use`` 的均匀随机数。

        Args:
            use: 用途。
            position: token 在整条序列（提示词加新 token）里的下标，不小于 0。
            count: 几个位置，可以为 0。

        Returns:
            ``[count]`` float64，在 ``[0, 1)`` 内。
        """
        raw = np.random.Philox(key=self._key, counter=position).random_raw(_BLOCK * count)
        return (raw[use::_BLOCK] >> np.uint64(11)) * 2.0**-53


def row_streams(seed: int | None, batch: int) -> list[RowStream]:
    """一批里各行的随机数：第 b 行的种子是 ``seed + b``。"""
    return [RowStream(None if seed is None else seed + row) for row in range(batch)]
