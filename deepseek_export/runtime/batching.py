"""把长短不一的序列右填充成批，再沿序列方向切块。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD_ID = 0  # 填充位置的输出没有人读，任何合法的 id 都行


@dataclass(frozen=True)
class Chunk:
    """一次模型调用的输入。

    Attributes:
        start: 这一块在原序列里的起点。
        input_ids: ``[B, S]`` int64，右填充。
        past_lens: ``[B]`` int64。已在前面的块里结束的行停在自己的长度上，填充写在它后面，不碰它的内容。
        counts: ``[B]`` int64，每行在这一块里真正的 token 数；已结束的行为 0。
    """

    start: int
    input_ids: np.ndarray
    past_lens: np.ndarray
    counts: np.ndarray


def right_padded_chunks(rows: Sequence[np.ndarray], chunk: int | None) -> Iterator[Chunk]:
    """依次产出各块，覆盖到最长的一行为止。

    任何一行都有 ``past_lens[b] + S <= max(len)``，所以容量只要放得下最长的一行。

    Args:
        rows: B 个一维整数数组，长度都不为 0。
        chunk: 每块最多多少个位置；``None`` 表示一块走完。
    """
    lens = np.array([len(row) for row in rows], np.int64)
    longest = int(lens.max())
    size = longest if chunk is None else chunk
    for start in range(0, longest, size):
        width = min(size, longest - start)
        input_ids = np.full((len(rows), width), PAD_ID, np.int64)
        for row, ids in enumerate(rows):
            part = ids[start : start + width]
            input_ids[row, : len(part)] = part
        yield Chunk(start, input_ids, np.minimum(lens, start), np.clip(lens - start, 0, width))
