"""dsx 的 dtype 与数组，换成 ONNX Runtime 的写法。"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime as ort

from deepseek_export.backend.contract import Port
from deepseek_export.checkpoint.weight_only import packed_int4
from deepseek_export.dtypes import DTYPES

_NAMES = {dtype.onnx_type: dtype.name for dtype in DTYPES.values()}


def port_of(node: ort.NodeArg) -> Port:
    """会话的一个输入或输出；dtype 不认识的保留 ONNX Runtime 的写法。"""
    dims = tuple(dim if isinstance(dim, (int, str)) else None for dim in node.shape)
    return Port(node.name, _NAMES.get(node.type, node.type), dims)


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """与 ``array`` 共用内存的 OrtValue。ORT 不认 ml_dtypes，bfloat16 要当 uint16 传入并另给 ONNX 类型。

    int4 是例外：ORT 按两个一字节读，所以另开一块内存，形状照写、只用前一半，由 OrtValue 持有。
    """
    if array.dtype == ml_dtypes.int4:
        halves = np.zeros(array.shape, np.uint8)
        halves.reshape(-1)[: array.size // 2] = packed_int4(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, DTYPES["int4"].onnx)
    if array.dtype == ml_dtypes.bfloat16:
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, DTYPES["bfloat16"].onnx)
    return ort.OrtValue.ortvalue_from_numpy(array)
