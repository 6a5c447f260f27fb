"""重建的引擎与原来的比较：哪些必须逐字节相同，plan 里哪些字节可以不同。"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

_ELF = b"\x7fELF\x02\x01"
_NOBITS = 8
#: 小于它的权重（norm 的增益、偏置）可能碰巧在别处出现，不逐个找。
_SMALLEST = 1024
#: engine.json 里只有这些随每次构建变：plan 的哈希、用时、峰值内存。
_VARYING = ("sha256", "seconds", "peak_rss_bytes")


def read_engine(directory: Path) -> dict[str, bytes]:
    """引擎目录里的全部文件：相对路径 → 内容。"""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def kernel_images(plan: bytes) -> dict[int, bytes]:
    """plan 里的每个 cubin：偏移 → 内容；大小由 ELF 头、段表、节表算出。"""
    images = {}
    at = plan.find(_ELF)
    while at >= 0:
        programs, sections = struct.unpack_from("<QQ", plan, at + 32)
        each, count, size, number = struct.unpack_from("<HHHH", plan, at + 54)
        end = max(sections + size * number, programs + each * count)
        for index in range(number):
            header = at + sections + size * index
            (kind,) = struct.unpack_from("<I", plan, header + 4)
            offset, length = struct.unpack_from("<QQ", plan, header + 24)
            end = max(end, 0 if kind == _NOBITS else offset + length)
        images[at] = plan[at : at + end]
        at = plan.find(_ELF, at + end)
    return images


def weight_pieces(plan: bytes, model: Path) -> dict[str, dict[int, bytes]]:
    """ONNX 的权重在 plan 里的样子：名字 → 偏移 → 内容。

    原样的是一整块；编译器把输入相同的两个线性层并成一个矩阵乘时转置再拼起来，那就是转置之后的一行一行。
    """
    found = {}
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        length = int(entry.get("length", 0))
        if length < _SMALLEST:
            continue
        with (model.parent / entry["location"]).open("rb") as file:
            file.seek(int(entry.get("offset", 0)))
            data = file.read(length)
        at = plan.find(data)
        found[tensor.name] = {at: data} if at >= 0 else _rows(plan, data, tensor.dims)
    return found


def _rows(plan: bytes, data: bytes, dims: Sequence[int]) -> dict[int, bytes]:
    """``[输出, 输入]`` 的矩阵转置之后的每一行在 plan 里的偏移，依次往后找。"""
    outputs, inputs = dims
    cells = np.frombuffer(data, np.uint8).reshape(outputs, inputs, -1)
    places: dict[int, bytes] = {}
    at = -1
    for row in cells.swapaxes(0, 1):
        at = plan.find(row.tobytes(), at + 1)
        places[at] = row.tobytes()
    return places


def _lasting(record: object) -> object:
    """engine.json 去掉随每次构建变的键。"""
    if isinstance(record, dict):
        return {key: _lasting(value) for key, value in record.items() if key not in _VARYING}
    return record


def assert_rebuilt(old: Mapping[str, bytes], new: Mapping[str, bytes], directory: Path) -> None:
    """``new`` 是 ``old`` 重建的结果。

    除了 plan 与 engine.json，文件逐字节相同；engine.json 只有 plan 的哈希、用时、内存不同；plan 一样大，cubin 与权重在同样的位置、逐字节相同，
    其余不同的字节不到千分之一。

    Args:
        old, new: :func:`read_engine` 的结果。
        directory: 引擎目录，从里面的 ONNX 读权重。
    """
    assert sorted(new) == sorted(old)
    for name in new:
        if name == "engine.json":
            assert _lasting(json.loads(new[name])) == _lasting(json.loads(old[name]))
        elif not name.endswith(".plan"):
            assert new[name] == old[name], name
        else:
            assert_same_but_numbering(old[name], new[name], directory / name.replace(".plan", ".onnx"))


def assert_same_but_numbering(old: bytes, new: bytes, model: Path) -> None:
    """两个 plan 一样大，cubin、权重相同，其余不到千分之一个字节不同。"""
    assert len(new) == len(old)
    kernels, weights = kernel_images(old), weight_pieces(old, model)
    assert kernels
    assert weights
    assert kernel_images(new) == kernels
    for name, pieces in weights.items():
        assert -1 not in pieces, f"plan 里找不到 {name}"
        for at, piece in pieces.items():
            assert new[at : at + len(piece)] == piece, name
    differing = np.count_nonzero(np.frombuffer(new, np.uint8) != np.frombuffer(old, np.uint8))
    assert differing < len(old) / 1000
