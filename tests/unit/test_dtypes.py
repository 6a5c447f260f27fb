"""dtypes.py：唯一的 dtype 表，每一行与各个库自己的写法一致；别处不再另立对照表。"""

from __future__ import annotations

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, defs, helper
from safetensors.numpy import save

from deepseek_export.dtypes import BY_ONNX, BY_SAFETENSORS, DTYPES, by_numpy
from deepseek_export.reference.weights import by_torch, torch_dtype

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
ROWS = [pytest.param(row, id=row.name) for row in DTYPES.values()]
#: 一种 dtype 的各种写法：名字、文件头的标签、ONNX Runtime 与 Triton 的类型，以及 ``TensorProto`` 的成员名。
SPELLINGS = {
    spelling
    for row in DTYPES.values()
    for spelling in (
        row.name,
        row.safetensors,
        row.onnx_type,
        row.triton,
        TensorProto.DataType.Name(row.onnx),
    )
}
BYTES = {1, 2, 4, 8}


@pytest.mark.parametrize("row", ROWS)
def test_spellings_agree_with_the_libraries(row):
    """numpy、onnx、safetensors、torch 的写法都是那个库自己的。"""
    assert row.numpy == np.dtype(getattr(ml_dtypes, row.name, row.name))
    assert helper.tensor_dtype_to_np_dtype(row.onnx) == row.numpy
    assert (BY_ONNX[row.onnx], by_numpy(row.numpy)) == (row, row)
    assert row.onnx_type in {t for c in defs.get_schema("Cast").type_constraints for t in c.allowed_type_strs}
    assert by_torch(torch_dtype(row.name)) == row
    if row.name != "int4":  # 存成字节：torch 的 int4 没有内容，safetensors 没有 int4
        assert torch_dtype(row.name).itemsize * 8 == row.bits
        assert BY_SAFETENSORS[row.safetensors] == row
        assert f'"dtype":"{row.safetensors}"'.encode() in save({"x": np.zeros(2, row.numpy)})
    assert row.nbytes(6) == 6 * row.bits // 8


def tables(source: str) -> list[int]:
    """源码里 dtype 对照表的行号：一个字典至少有两项，键、值都是 dtype 的写法（值也可以是字节数）。"""

    def spelled(node: ast.AST | None) -> bool:
        match node:
            case ast.Constant(value=str(text)) | ast.Attribute(attr=text):
                return text in SPELLINGS
            case ast.Call(args=[argument]):
                return spelled(argument)
        return False

    def size(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and type(node.value) is int and node.value in BYTES

    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Dict)
        and sum(
            spelled(key) and (spelled(value) or size(value))
            for key, value in zip(node.keys, node.values, strict=True)
        )
        > 1
    ]


def test_there_is_one_table():
    """名字、numpy、torch、ONNX、safetensors、Triton、字节数之间的对照只写在 dtypes.py 里；按 dtype 查容差不是对照。"""
    for literal in (
        '{"float16": "F16", "float32": "F32"}',
        '{"float16": 2, "int64": 8}',
        '{"tensor(float)": np.dtype(np.float32), "tensor(int8)": np.dtype(np.int8)}',
        "{torch.float16: onnx.TensorProto.FLOAT16, torch.float32: onnx.TensorProto.FLOAT}",
    ):
        assert tables(literal) == [1], "检查本身要有效"
    assert tables("{torch.float32: 1e-4, torch.float16: 1e-2}") == []
    folders = ("deepseek_export", "perf", "tools", "tests")
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for line in tables(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize("look_up", [lambda: torch_dtype("int3"), lambda: by_torch(torch.complex64)])
def test_unknown_dtypes_are_refused(look_up):
    """表里没有的当场报错，不猜。"""
    with pytest.raises(KeyError):
        look_up()
