"""KV 缓存：一组预分配的 OrtValue，同时绑成模型的输入和输出，由模型原地更新。"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from deepseek_export.checkpoint.weight_only import packed_int4
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError

SMALLEST_BUCKET = 256

_CACHE_NAME = re.compile(r"(kv_cache|k_cache|v_cache)\.(\d+)")
_CACHE_DTYPES: dict[str, np.dtype] = {
    DTYPES[name].onnx_type: DTYPES[name].numpy for name in ("float32", "float16", "bfloat16", "int8")
}


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


@dataclass(frozen=True)
class CacheTensor:
    """一个缓存张量 ``[B, heads, T, width]`` 的静态信息。"""

    name: str
    out_name: str
    dtype: np.dtype
    heads: int
    width: int


@dataclass(frozen=True)
class CacheSpec:
    """一个模型要的全部缓存，从会话的输入输出推出，不依赖配置文件。"""

    tensors: tuple[CacheTensor, ...]

    @classmethod
    def from_session(cls, session: ort.InferenceSession) -> CacheSpec:
        """读会话的 I/O 类型。

        Args:
            session: 已加载的会话。

        Raises:
            DsxError: ``DSX-E508``，没有缓存输入、缺少对应输出、dtype 不支持，
                或形状不是 ``[B, 常数, T, 常数]``。
        """
        outputs = {node.name: node for node in session.get_outputs()}
        tensors = []
        for node in session.get_inputs():
            match = _CACHE_NAME.fullmatch(node.name)
            if match is None:
                continue
            out_name = f"{match[1]}_out.{match[2]}"
            out = outputs.get(out_name)
            if out is None or out.type != node.type:
                found = "没有" if out is None else f"类型为 {out.type}"
                raise contract_broken(f"缓存输入 {node.name}（{node.type}）对应的输出 {out_name} {found}")
            shape = list(node.shape)
            if node.type not in _CACHE_DTYPES:
                raise contract_broken(f"缓存 {node.name} 的类型 {node.type} 不在 {sorted(_CACHE_DTYPES)} 里")
            if len(shape) != 4 or not (isinstance(shape[1], int) and isinstance(shape[3], int)):
                raise contract_broken(f"缓存 {node.name} 的形状 {shape} 不是 [B, 常数, T, 常数]")
            tensors.append(CacheTensor(node.name, out_name, _CACHE_DTYPES[node.type], shape[1], shape[3]))
        if not tensors:
            raise contract_broken("模型没有 kv_cache.{i} 或 k_cache.{i} / v_cache.{i} 输入")
        return cls(tuple(tensors))

    @property
    def bytes_per_token(self) -> int:
        """一个序列每多一个位置，全部缓存多占的字节数。"""
        return sum(t.heads * t.width * t.dtype.itemsize for t in self.tensors)


class CacheBuffers:
    """一个批次的缓存内存。

    Args:
        spec: 有哪些缓存。
        batch: 行数 B。
        max_positions: 容量的上限（max_position_embeddings）。
        needed: 一开始就要放得下的位置数。

    Attributes:
        capacity: 当前的 T。
        version: 每次重新分配加一，使用者据此判断要不要重新 ``bind``。

    Raises:
        DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
    """

    def __init__(self, spec: CacheSpec, batch: int, max_positions: int, needed: int = 1) -> None:
        self.spec = spec
        self.batch = batch
        self.max_positions = max_positions
        self.capacity = bucket_capacity(needed, max_positions)
        self.version = 0
        # OrtValue 只借用 numpy 的内存，数组必须在这里留一份引用。
        self._arrays = {t.name: self._allocate(t, self.capacity) for t in spec.tensors}
        self._values = {name: ort_value(array) for name, array in self._arrays.items()}

    @property
    def nbytes(self) -> int:
        """全部缓存占用的字节数。"""
        return sum(array.nbytes for array in self._arrays.values())

    def array(self, name: str) -> np.ndarray:
        """缓存 ``name`` 的内存视图 ``[B, heads, T, width]``，供检查用；重新分配之后失效。"""
        return self._arrays[name]

    def value(self, name: str) -> ort.OrtValue:
        """缓存 ``name`` 的 OrtValue；重新分配之后失效。"""
        return self._values[name]

    def ensure(self, needed: int) -> bool:
        """保证每行放得下 ``needed`` 个位置，不够就升档并搬过去原有内容。

        逐个张量搬，额外的峰值内存只有一个张量。

        Returns:
            是否重新分配了（此前的绑定随之失效）。

        Raises:
            DsxError: ``DSX-E506``，超过 ``max_positions``；此时缓存原样不动。
        """
        if needed <= self.capacity:
            return False
        capacity = bucket_capacity(needed, self.max_positions)
        for tensor in self.spec.tensors:
            grown = self._allocate(tensor, capacity)
            grown[:, :, : self.capacity] = self._arrays[tensor.name]
            self._arrays[tensor.name] = grown
            self._values[tensor.name] = ort_value(grown)
        self.capacity = capacity
        self.version += 1
        return True

    def bind(self, io_binding: Any) -> None:
        """把每个缓存同时绑成输入和输出：TensorScatter 因此原地写，不随容量复制。

        Args:
            io_binding: ``InferenceSession.io_binding()`` 的结果。
        """
        for tensor in self.spec.tensors:
            value = self._values[tensor.name]
            io_binding.bind_ortvalue_input(tensor.name, value)
            io_binding.bind_ortvalue_output(tensor.out_name, value)

    def _allocate(self, tensor: CacheTensor, capacity: int) -> np.ndarray:
        return np.zeros((self.batch, tensor.heads, capacity, tensor.width), tensor.dtype)


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """测速用的缓存内容：浮点是标准正态的随机数；int8 是随机的码，末尾两个 scale 使它们代表的数同样大小。"""
    if dtype != np.int8:
        return rng.standard_normal(shape, np.float32).astype(dtype)
    rows = rng.integers(-127, 128, shape, np.int8)
    rows[..., -6:] = (64, 0, -20, 64, 0, -28)  # 乘以 2^-6 与 2^-14：均匀分布，都至多是 2
    return rows


def contract_broken(what: str) -> DsxError:
    """模型的输入输出与 dsx 的约定不符（``DSX-E508``）。"""
    return DsxError("DSX-E508", what, "用 dsx export 重新导出；不是 dsx 导出的 ONNX 不能在这里运行")


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """与 ``array`` 共用内存的 OrtValue。ORT 不认 ml_dtypes，bfloat16 要当 uint16 传入并另给 ONNX 类型。

    int4 是例外：ORT 按两个一字节读，所以另开一块内存，形状照写、只用前一半，由 OrtValue 持有。
    """
    if array.dtype == ml_dtypes.int4:
        halves = np.zeros(array.shape, np.uint8)
        halves.reshape(-1)[: array.size // 2] = packed_int4(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, TensorProto.INT4)
    if array.dtype == ml_dtypes.bfloat16:
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
