"""KV 缓存：一组预分配的内存，同时绑成图的输入和输出，由图原地更新。"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from deepseek_export.backend.base import Caches, SavedRow
from deepseek_export.backend.capacity import bucket_capacity
from deepseek_export.backend.contract import CacheSpec, CacheTensor
from deepseek_export.backend.ort.values import ort_value


class _Storage:
    """全部行的内存；视图与它的主人共用。

    Attributes:
        capacity: 当前的 T。
        version: 每次重新分配加一，使用者据此判断要不要重新绑定。
        arrays: 张量名 → ``[B, heads, T, width]``。
    """

    def __init__(self, spec: CacheSpec, batch: int, max_positions: int, needed: int) -> None:
        self._spec, self._batch, self._max_positions = spec, batch, max_positions
        self.capacity, self.version = bucket_capacity(needed, max_positions), 0
        self.arrays = {t.name: self._allocate(t, self.capacity) for t in spec.tensors}

    def grow(self, needed: int) -> bool:
        """逐个张量搬，额外的峰值内存只有一个张量。"""
        if needed <= self.capacity:
            return False
        capacity = bucket_capacity(needed, self._max_positions)
        for tensor in self._spec.tensors:
            grown = self._allocate(tensor, capacity)
            grown[:, :, : self.capacity] = self.arrays[tensor.name]
            self.arrays[tensor.name] = grown
        self.capacity = capacity
        self.version += 1
        return True

    def _allocate(self, tensor: CacheTensor, capacity: int) -> np.ndarray:
        return np.zeros((self._batch, tensor.heads, capacity, tensor.width), tensor.dtype)


class OrtCaches(Caches):
    """主机内存里的缓存；各行在内存里相邻，所以连着的几行就是一段，视图不必复制。"""

    def __init__(self, spec: CacheSpec, batch: int, storage: _Storage, start: int = 0) -> None:
        super().__init__(spec, batch)
        self._storage, self._start = storage, start
        # OrtValue 只借用 numpy 的内存，数组由 storage 留住。
        self._values: dict[str, ort.OrtValue] = {}
        self._valued: int | None = None

    @classmethod
    def allocate(cls, spec: CacheSpec, batch: int, max_positions: int, needed: int = 1) -> OrtCaches:
        """分配清零的缓存。

        Args:
            spec: 有哪些张量。
            batch: 行数 B。
            max_positions: 容量的上限。
            needed: 一开始就要放得下的位置数。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
        """
        return cls(spec, batch, _Storage(spec, batch, max_positions, needed))

    @property
    def capacity(self) -> int:
        return self._storage.capacity

    @property
    def version(self) -> int:
        """每次重新分配加一，此前的绑定随之失效。"""
        return self._storage.version

    def array(self, name: str) -> np.ndarray:
        """张量 ``name`` 的内存视图 ``[B, heads, T, width]``；重新分配之后失效。"""
        return self._storage.arrays[name][self._start : self._start + self.batch]

    def value(self, name: str) -> ort.OrtValue:
        """张量 ``name`` 的 OrtValue；重新分配之后失效。"""
        if self._valued != self.version:
            self._values = {t.name: ort_value(self.array(t.name)) for t in self.spec.tensors}
            self._valued = self.version
        return self._values[name]

    def ensure(self, needed: int) -> bool:
        return self._storage.grow(needed)

    def view(self, start: int, count: int) -> OrtCaches:
        return OrtCaches(self.spec, count, self._storage, self._start + start)

    def copy_row(self, source: int, target: int, length: int, origin: Caches | None = None) -> None:
        if origin is None or origin is self:
            for tensor in self.spec.tensors:
                array = self.array(tensor.name)
                array[target, :, :length] = array[source, :, :length]
        else:
            self.restore_row(target, origin.save_row(source, length))

    def clear_row(self, row: int) -> None:
        for tensor in self.spec.tensors:
            self.array(tensor.name)[row] = 0

    def save_row(self, row: int, length: int) -> SavedRow:
        return {t.name: self.array(t.name)[row, :, :length].copy() for t in self.spec.tensors}

    def restore_row(self, row: int, saved: SavedRow) -> None:
        for name, rows in saved.items():
            self.array(name)[row, :, : rows.shape[1]] = rows

    def bind(self, io_binding: Any) -> None:
        """把每个缓存同时绑成输入和输出：TensorScatter 因此原地写，不随容量复制。

        Args:
            io_binding: ``InferenceSession.io_binding()`` 的结果。
        """
        for tensor in self.spec.tensors:
            value = self.value(tensor.name)
            io_binding.bind_ortvalue_input(tensor.name, value)
            io_binding.bind_ortvalue_output(tensor.out_name, value)
