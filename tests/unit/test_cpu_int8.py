"""C++ 算子库的 int8 矩阵乘：逐指令集、逐块大小与定义相同，与 onnxruntime 的相同；与线程数无关；拒绝而不崩溃。"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.ops.table import INT8_LINEAR
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES, tolerance
from tests.cpu_build import SOURCES
from tests.int8_node import call, linear_inputs, linear_session, onnxruntime_linear, quantized, weights

pytestmark = pytest.mark.unit

#: 各有一份 int8 的 kernel；``avx512`` 的机器没有 VNNI 时用 ``avx2`` 的。
ISAS = ("plain", "avx2", "avx512")
#: (行, K, N)：一行、直接读的几行、重排的、跨块的；N、K 都不是向量长度的倍数。
SHAPES = (((1,), 256, 70), ((3,), 96, 33), ((2, 3), 70, 5), ((23,), 160, 67), ((0,), 64, 4))


@pytest.fixture(autouse=True)
def registered(library):
    """只有普通循环的平台上不登记这些算子。"""
    if library.isas == ("plain",):
        pytest.skip("这个平台没有 int8 的 kernel")


@functools.cache
def session_for(library, *arguments):
    return linear_session(library, *arguments)


def check(library, isa: str, rows: tuple[int, ...], K: int, N: int, block: int) -> None:
    inputs = linear_inputs(rows, K, N, block)
    got = call(linear_session(library, K, N, block, isa), inputs)
    want = quantized(inputs["x"], block) @ weights(inputs["codes"], inputs["scales"], K).T
    assert got.shape == want.shape
    assert TOLERANCES["op", "float32"].accepts(measure(got, want.astype(np.float32)))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_matches_the_definition(library, isa: str, block: int):
    """CPU-12：激活逐块量化到 int8，其余等于 float64 的乘积，只差 float32 的舍入。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for rows, K, N in SHAPES:
        check(library, isa, rows, K, N, block)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(library, data):
    """CPU-12：随机的行数、宽度、块、指令集。"""
    rows, K, N = (data.draw(st.integers(1, most)) for most in (40, 400, 150))
    block = data.draw(st.sampled_from([32, 64, 128]))
    check(library, data.draw(st.sampled_from(library.isas)), (rows,), K, N, block)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("rows", [1, 40])
def test_kernel_is_as_accurate_as_onnxruntime(library, rows: int, block: int):
    """CPU-12：与函数体里的 MatMulNBits 之差、与还原的权重之差，都在 int8 激活的容差之内。"""
    inputs = linear_inputs((rows,), 512, 96, block)
    got = call(session_for(library, 512, 96, block), inputs)
    limit = tolerance("op", "float32", "int8")
    assert limit.accepts(measure(got, call(onnxruntime_linear(512, 96, block), inputs)))
    exact = inputs["x"] @ weights(inputs["codes"], inputs["scales"], 512).T
    assert limit.accepts(measure(got, exact.astype(np.float32)))


@pytest.mark.parametrize("rows", [1, 300])
def test_result_does_not_depend_on_the_number_of_threads(library, rows: int):
    """CPU-3：怎么切只看形状，1 个与 3 个线程的结果逐位相同。"""
    inputs = linear_inputs((rows,), 1024, 777, 32)
    one, three = (call(session_for(library, 1024, 777, 32, "", threads), inputs) for threads in (1, 3))
    assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda a: a[:, :69], "x 是 [2, 69]，最后一维应为 K=70"),
        ("codes", lambda a: a[:4], "codes 是 [4, 3, 32]，应为 [5, 3, 32]"),
        ("codes", lambda a: a[:, :2], "codes 是 [5, 2, 32]，应为 [5, 3, 32]"),
        ("scales", lambda a: a[:, :2], "scales 是 [5, 2]，应为 [5, 3]"),
    ],
)
def test_wrong_shapes_are_refused(library, name: str, change, message: str):
    """CPU-4：形状不符，说明是哪个输入、应是什么；进程不崩。"""
    inputs = linear_inputs((2,), 70, 5, 32)
    inputs[name] = change(inputs[name])
    with pytest.raises(Exception, match=re.escape(message)):
        call(session_for(library, 70, 5, 32), inputs)


def test_unsupported_blocks_are_refused_when_the_session_is_made(library):
    """CPU-4：没有 kernel 的块大小，建会话时就拒绝。"""
    with pytest.raises(Exception, match="block_size=16"):
        linear_session(library, 64, 4, 16)


def test_table_is_the_same_on_both_sides():
    """C++ 里的算子名、输入的次序与契约表一致。"""
    source = (SOURCES / "int8_linear_op.cc").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)"', re.search(r"kInputs\{(.*?)\}", source)[1])
    assert listed == [port.name for port in INT8_LINEAR.inputs]
    assert f'return "{INT8_LINEAR.name}"' in source
