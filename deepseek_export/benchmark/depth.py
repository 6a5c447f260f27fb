"""在给定的上下文深度解码：缓存直接填好，不必先 prefill 那么长。"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.runtime.session import ModelSession

_BLOCK = 256


def fill_caches(caches: Caches, length: int, seed: int) -> None:
    """把前 ``length`` 个位置写成随机数：每一页都落到物理内存上，一步的计算量与真的上下文相同。"""
    rng = np.random.default_rng(seed)
    repeats = -(-length // _BLOCK)
    for tensor in caches.spec.tensors:
        block = random_rows(rng, (tensor.heads, _BLOCK, tensor.width), tensor.dtype)
        rows = np.tile(block, (1, repeats, 1))[:, :length]
        for row in range(caches.batch):
            caches.restore_row(row, {tensor.name: rows})


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """缓存内容：浮点是标准正态的随机数；int8 是随机的码，末尾两个 scale 使它们代表的数同样大小。"""
    if dtype != np.int8:
        return rng.standard_normal(shape, np.float32).astype(dtype)
    rows = rng.integers(-127, 128, shape, np.int8)
    rows[..., -6:] = (64, 0, -20, 64, 0, -28)  # 乘以 2^-6 与 2^-14：均匀分布，都至多是 2
    return rows


class DepthDecoder:
    """在固定的深度反复走同一步：每行已有 ``context - 1`` 个 token，再来一个。

    Args:
        session: 主模型。
        batch: 行数。
        context: 走完这一步时每行的长度。
        seed: 缓存内容的种子。

    Raises:
        DsxError: ``DSX-E506``，``context`` 超过模型的最大长度。
    """

    def __init__(self, session: ModelSession, batch: int, context: int, seed: int = 0) -> None:
        self._session = session
        self.caches = session.new_caches(batch, context)
        fill_caches(self.caches, context - 1, seed)
        self._ids = np.zeros((batch, 1), np.int64)
        self._past = np.full(batch, context - 1, np.int64)

    def step(self) -> float:
        """走一步，返回秒数。"""
        began = perf_counter()
        self._session.run(self._ids, self._past, self._ids, self.caches)
        return perf_counter() - began
