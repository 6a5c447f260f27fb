"""缓存有几个位置：随长度逐档变大的，一档是多大。"""

from __future__ import annotations

from deepseek_export.errors import DsxError

SMALLEST_BUCKET = 256


def bucket_capacity(needed: int, max_positions: int) -> int:
    """能放下 ``needed`` 个位置的最小档位：256、512、1024……逐档翻倍，不超过 ``max_positions``。

    Raises:
        DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
    """
    if needed > max_positions:
        raise DsxError(
            "DSX-E506",
            f"需要 {needed} 个位置，模型的 max_position_embeddings 只有 {max_positions}",
            "缩短输入，或减少要生成的 token 数",
        )
    capacity = SMALLEST_BUCKET
    while capacity < needed:
        capacity *= 2
    return min(capacity, max_positions)
