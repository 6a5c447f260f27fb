"""解码一步至少要读多少字节，这台机器每秒读得动多少：解码受限于读内存，两者之比就是还剩多少。

一步读的由 manifest 算：权重的算法与 ``dsx plan`` 是同一个（:meth:`~deepseek_export.plan.shape.ModelShape.weights_read`），缓存是看得见的行。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np

from deepseek_export.bundle.manifest import Manifest
from deepseek_export.cpu_library import find_library
from deepseek_export.dtypes import DTYPES
from deepseek_export.machine import cores, memory_bytes
from deepseek_export.plan.shape import PARTS, ModelShape, Part, part_of
from deepseek_export.plan.stages import layer_of

#: 探针的内存：远大于末级 cache；内存小的机器上至多占八分之一。
_BUFFER = 512 << 20
_SHARE = 8
#: 一次读多少字节：线程之间快慢不齐时，先做完的接着拿。
_CHUNK = 16 << 20
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class StepBytes:
    """一步解码至少要读的。

    Attributes:
        weights: 权重，字节：稠密的各一遍，路由专家按命中的平均个数，词嵌入只查几行不算。
        cache: 各行看得见的缓存，字节；稀疏注意力只读选中的行，索引 key 全读。
    """

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """合计。"""
        return self.weights + self.cache


def step_bytes(manifests: Sequence[Manifest], batch: int, context: int) -> StepBytes:
    """``batch`` 行、每行走完是 ``context`` 个 token 的一步。

    Args:
        manifests: bundle 的 manifest；一套 stage 的就是每个 stage 的。
        batch: 行数。
        context: 每行的长度。
    """
    weights, cache = 0.0, 0
    for one in manifests:
        shape = ModelShape.build(one.model, one.profile, 0)
        parts, tied = _parts(one)
        weights += shape.weights_read(parts, batch, tied=tied)
        cache += batch * _cache_read(one, shape, context)
    return StepBytes(round(weights), cache)


def _parts(manifest: Manifest) -> tuple[dict[Part, float], bool]:
    """主模型各部分的权重写成了多少字节；词嵌入是不是也当 lm_head 读一遍。"""
    parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    layers = set(manifest.main.layers)
    for name, recipe in manifest.weights.recipes.items():
        source = recipe.sources[0] if recipe.sources else name
        layer = layer_of(source)
        if layer is not None and layer not in layers:
            continue  # 草稿模型的
        if name.startswith(_HEAD):
            parts["head"] += recipe.nbytes
        elif source != _EMBED or name == _EMBED:  # 另存一份只为查表的词嵌入不算
            parts[part_of(source, recipe.shape)] += recipe.nbytes
    return parts, manifest.model.tie_word_embeddings and not parts["head"]


def _cache_read(manifest: Manifest, shape: ModelShape, context: int) -> int:
    """一行一步读多少字节的缓存：主模型的各层。"""
    total = 0
    for layer in manifest.main.layers:
        for tensor in manifest.cache.of_layer(layer):
            dtype = DTYPES[tensor.dtype or manifest.cache.dtype]
            # 只有几层有的是索引 key：打分要看全部；其余的只看选中的行。
            rows = shape.rows_read(context) if tensor.layers is None else context
            total += dtype.nbytes(tensor.heads * tensor.width * rows)
    return total


def open_reader(threads: int | None) -> MemoryReader | None:
    """这台机器的探针；没有 C++ 算子库，或它是早先构建的，为 ``None``：读速不知道。

    Args:
        threads: 几个线程一起读，见 :class:`MemoryReader`。

    Raises:
        DsxError: 同 :func:`~deepseek_export.cpu_library.find_library`。
    """
    library = find_library()
    read = None if library is None else library.memory_reader()
    return None if read is None else MemoryReader(read, threads)


class MemoryReader:
    """反复把同一大块内存读一遍，量这台机器的读速；写成 ``with``，离开时放掉内存与线程。

    读的循环在 C++ 算子库里：numpy 的归约在一个核上读不满内存。

    Args:
        read: 读一段内存，见 :meth:`~deepseek_export.cpu_library.CpuLibrary.memory_reader`。
        threads: 几个线程一起读；``None`` 是这个进程能用的核数。

    Attributes:
        nbytes: 读一遍是多少字节。
        chunks: 一块块的内存。
    """

    def __init__(self, read: Callable[[int, int], int], threads: int | None) -> None:
        self._read = read
        size = min(_BUFFER, (memory_bytes() or _BUFFER * _SHARE) // _SHARE)
        array = np.ones(size // 8, np.uint64)
        self.nbytes = array.nbytes
        self.chunks = tuple(np.array_split(array, max(array.nbytes // _CHUNK, 1)))
        self._pool = ThreadPoolExecutor(threads or cores(), "dsx-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self.chunks = ()

    def rate(self) -> float:
        """读一遍，每秒几个字节。"""
        began = perf_counter()
        for _ in self._pool.map(self._one, self.chunks):
            pass
        return self.nbytes / (perf_counter() - began)

    def _one(self, chunk: np.ndarray) -> int:
        return self._read(chunk.ctypes.data, chunk.nbytes)
