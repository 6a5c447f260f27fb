"""bundle 的原地缓存，套上 transformers 的 ``Cache`` 接口：beam search 换行、assisted decoding 回退都落到同一块内存上。"""

from __future__ import annotations

import numpy as np
import torch
from transformers import Cache

from deepseek_export.backend.base import Caches
from deepseek_export.runtime import ModelSession


class BundleCache(Cache):
    """一个批次的缓存；第一次 ``forward`` 时按批大小分配。

    transformers 眼里缓存是一列列的，左填充也占列；图里每行只存真正的 token，从 0 起连续排。:attr:`valid` 记着哪一列对哪一行是真的。

    Attributes:
        valid: [B, 列数] bool。
        buffers: 图的缓存；还没跑过时为 ``None``。
    """

    def __init__(self, session: ModelSession) -> None:
        super().__init__(layers=[])
        self._session = session
        self.reset()

    def reset(self) -> None:
        """丢掉全部内容。"""
        self.buffers: Caches | None = None
        self.valid = np.zeros((0, 0), np.bool_)

    @property
    def lens(self) -> np.ndarray:
        """每行已有多少个真正的 token，[B] int64。"""
        return self.valid.sum(1, dtype=np.int64)

    @property
    def is_linear(self) -> list[bool]:
        """没有线性注意力层；基类从空的 ``layers`` 推不出来。"""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """有多少列。"""
        return self.valid.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """最多多少列：模型的 max_position_embeddings。"""
        return self._session.max_positions

    def allocate(self, batch: int) -> Caches:
        """取得缓冲区；第一次调用时分配。"""
        if self.buffers is None:
            self.buffers = self._session.new_caches(batch)
            self.valid = np.zeros((batch, 0), np.bool_)
        return self.buffers

    def append(self, valid: np.ndarray) -> None:
        """记下刚写进去的 [B, S] 列里哪些是真的。"""
        self.valid = np.concatenate([self.valid, valid], axis=1)

    def crop(self, tokens_to_remove: int) -> None:
        """去掉末尾的 ``-tokens_to_remove`` 列；内容留在原处，以后会被覆盖。"""
        self.valid = self.valid[:, : self.valid.shape[1] + tokens_to_remove]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """第 i 行换成原来的第 ``beam_idx[i]`` 行。"""
        self._take(beam_idx.cpu().numpy())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """只留这几行。"""
        self._take(indices.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """每行重复 ``repeats`` 次。"""
        self._take(np.repeat(np.arange(len(self.valid)), repeats))

    def _take(self, rows: np.ndarray) -> None:
        if self.buffers is None:
            return
        used = int(self.lens.max(initial=0))
        fresh = self._session.new_caches(len(rows), max(used, 1))
        self.buffers = self.buffers.taken(fresh, rows.tolist(), used)
        self.valid = self.valid[rows]
