"""dtype 的唯一一张表：dsx 的名字、numpy 的类型，以及它在各种格式里的写法。

别处只用名字（``"float16"``）或 :class:`Dtype`，不再另立对照表。torch 的类型与这里同名，见
:func:`deepseek_export.reference.weights.torch_dtype`；TensorRT 的由各自的模块按名字取。这里不导入 torch 与 onnx。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """一种元素类型。

    Attributes:
        name: dsx 里的名字，也是 numpy、ml_dtypes、torch 的名字。
        bits: 存储时一个元素占几位；只有 int4 与 :attr:`numpy` 不同，两个一字节。
        onnx: ``onnx.TensorProto.DataType`` 的编号。
        safetensors: 文件头里的写法；int4 成对存成字节。
        triton: Triton 签名里指针的写法；kernel 不用的为空。
    """

    name: str
    bits: int
    onnx: int
    safetensors: str
    triton: str = ""

    @property
    def numpy(self) -> np.dtype:
        """内存里的类型；int4 一个元素占一字节。"""
        import ml_dtypes as _ml_dtypes  # noqa: F401  向 numpy 登记它没有的名字；只测 kernel 的机器上没有装

        return np.dtype(self.name)

    @property
    def onnx_type(self) -> str:
        """ONNX 算子 schema 的写法，例如 ``tensor(float16)``；float32 叫 ``float``，float64 叫 ``double``。"""
        return f"tensor({_ONNX_NAMES.get(self.name, self.name)})"

    def nbytes(self, count: int) -> int:
        """``count`` 个元素存储时占多少字节。"""
        return count * self.bits // 8


_ONNX_NAMES = {
    "float32": "float",
    "float64": "double",
    "float8_e5m2": "float8e5m2",
    "float8_e4m3fn": "float8e4m3fn",
}

_ROWS = (
    Dtype("float32", 32, 1, "F32", "*fp32"),
    Dtype("uint8", 8, 2, "U8"),
    Dtype("int8", 8, 3, "I8", "*i8"),
    Dtype("uint16", 16, 4, "U16"),
    Dtype("int16", 16, 5, "I16"),
    Dtype("int32", 32, 6, "I32", "*i32"),
    Dtype("int64", 64, 7, "I64", "*i64"),
    Dtype("bool", 8, 9, "BOOL"),
    Dtype("float16", 16, 10, "F16", "*fp16"),
    Dtype("float64", 64, 11, "F64"),
    Dtype("uint32", 32, 12, "U32"),
    Dtype("uint64", 64, 13, "U64"),
    Dtype("bfloat16", 16, 16, "BF16", "*bf16"),
    Dtype("float8_e4m3fn", 8, 17, "F8_E4M3"),
    Dtype("float8_e5m2", 8, 19, "F8_E5M2"),
    Dtype("int4", 4, 22, "U8", "*i8"),
)

#: 名字 → dtype。
DTYPES: Mapping[str, Dtype] = MappingProxyType({row.name: row for row in _ROWS})

#: ONNX 的编号 → dtype。
BY_ONNX: Mapping[int, Dtype] = MappingProxyType({row.onnx: row for row in _ROWS})

#: safetensors 的写法 → dtype；``U8`` 是 uint8，int4 只在写的时候借用它。
BY_SAFETENSORS: Mapping[str, Dtype] = MappingProxyType(
    {row.safetensors: row for row in _ROWS if row.name != "int4"}
)


def by_numpy(dtype: np.dtype) -> Dtype:
    """numpy 的类型 → dtype。

    Raises:
        KeyError: 表里没有的类型。
    """
    return DTYPES[np.dtype(dtype).name]
