"""显存里的 KV 缓存；容量是建引擎时定的常数，从不重新分配。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from deepseek_export.backend.base import Caches, SavedRow
from deepseek_export.backend.contract import CacheSpec, CacheTensor
from deepseek_export.backend.tensorrt.cuda import Cuda
from deepseek_export.errors import DsxError


class _Memory:
    """每个张量一块显存；视图与它的主人共用，最后一个放手时归还。"""

    def __init__(self, cuda: Cuda, spec: CacheSpec, batch: int, capacity: int) -> None:
        self.cuda, self._owned = cuda, []
        self.addresses: dict[str, int] = {}
        for tensor in spec.tensors:
            nbytes = batch * capacity * tensor.bytes_per_token
            address = cuda.allocate(nbytes)
            self._owned.append(address)
            cuda.clear(address, nbytes)
            self.addresses[tensor.name] = self.addresses[tensor.out_name] = address

    def __del__(self) -> None:
        for address in getattr(self, "_owned", ()):
            self.cuda.free(address)


class DeviceCaches(Caches):
    """一个批次在显存里的缓存。"""

    def __init__(self, spec: CacheSpec, batch: int, capacity: int, memory: _Memory) -> None:
        super().__init__(spec, batch)
        self._capacity, self._memory = capacity, memory

    @classmethod
    def allocate(cls, cuda: Cuda, spec: CacheSpec, batch: int, capacity: int, needed: int) -> DeviceCaches:
        """分配清零的缓存。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过容量。
        """
        _check_fits(needed, capacity)
        return cls(spec, batch, capacity, _Memory(cuda, spec, batch, capacity))

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def addresses(self) -> dict[str, int]:
        """张量的输入名、输出名 → 显存地址；一对共用一块。"""
        return self._memory.addresses

    def ensure(self, needed: int) -> bool:
        """只核对容量。"""
        _check_fits(needed, self._capacity)
        return False

    def view(self, rows: int) -> DeviceCaches:
        return DeviceCaches(self.spec, rows, self._capacity, self._memory)

    def copy_row(self, source: int, target: int, length: int, origin: Caches | None = None) -> None:
        there = cast(DeviceCaches, origin or self)  # 同一个 Runner 分配的
        for tensor in self.spec.tensors:
            nbytes = length * tensor.width * tensor.dtype.itemsize
            for begin, end in zip(there._heads(tensor, source), self._heads(tensor, target), strict=True):
                self._memory.cuda.copy(begin, end, nbytes)

    def clear_row(self, row: int) -> None:
        for tensor in self.spec.tensors:
            for address in self._heads(tensor, row):
                self._memory.cuda.clear(address, self._capacity * tensor.width * tensor.dtype.itemsize)

    def save_row(self, row: int, length: int) -> SavedRow:
        saved = {}
        for tensor in self.spec.tensors:
            saved[tensor.name] = np.empty((tensor.heads, length, tensor.width), tensor.dtype)
            for head, address in enumerate(self._heads(tensor, row)):
                self._memory.cuda.download(saved[tensor.name][head], address)
        self._memory.cuda.synchronize()
        return saved

    def restore_row(self, row: int, saved: SavedRow) -> None:
        whole = {name: np.ascontiguousarray(rows) for name, rows in saved.items()}
        for tensor in self.spec.tensors:
            for head, address in enumerate(self._heads(tensor, row) if tensor.name in whole else ()):
                self._memory.cuda.upload(address, whole[tensor.name][head])
        self._memory.cuda.synchronize()

    def _heads(self, tensor: CacheTensor, row: int) -> Iterator[int]:
        """一行里各个头的第 0 个位置的地址。"""
        if not 0 <= row < self.batch:
            raise ValueError(f"第 {row} 行不在 {self.batch} 行之内")
        step = self._capacity * tensor.width * tensor.dtype.itemsize
        first = self.addresses[tensor.name] + row * tensor.heads * step
        return (first + head * step for head in range(tensor.heads))


def _check_fits(needed: int, capacity: int) -> None:
    if needed > capacity:
        what = f"需要 {needed} 个位置，引擎的缓存容量是 {capacity}"
        raise DsxError("DSX-E506", what, "用 dsx build --profile-shapes T=更大的容量 重建")
