"""C++ 算子库的 int8、int4 矩阵乘：逐指令集、逐块大小与定义相同，与 onnxruntime 的相同；与线程数无关；拒绝而不崩溃。"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES, tolerance
from tests.quant_node import (
    call,
    experts_inputs,
    experts_reference,
    experts_session,
    linear_inputs,
    linear_session,
    onnxruntime_experts,
    onnxruntime_linear,
    quantized,
    weights,
)

pytestmark = pytest.mark.unit

#: 各有一份 kernel；``avx512`` 的机器没有 VNNI 时用 ``avx2`` 的。
ISAS = ("plain", "avx2", "avx_vnni", "avx512")
#: (行, K, N)：一行、直接读的几行、重排的、跨块的；N、K 都不是向量长度的倍数。
#: int4 一次读 128 个权重，320、96 因此留下不满的一截；1100 是激活几块一起拆的好几批，另加不满的一块。
SHAPES = (
    *(((1,), 256, 70), ((2,), 320, 9), ((3,), 96, 33), ((2, 3), 70, 5)),
    *(((23,), 160, 67), ((6,), 1100, 40), ((0,), 64, 4)),
)
BITS = (8, 4)
#: 几位，零点是不是逐块给出。
FORMATS = ((8, False), (4, False), (4, True))


@pytest.fixture(autouse=True)
def registered(library):
    """只有普通循环的平台上不登记这些算子。"""
    if library.isas == ("plain",):
        pytest.skip("这个平台没有这些 kernel")


@functools.cache
def session_for(library, *arguments):
    return linear_session(library, *arguments)


def check(
    library, bits: int, isa: str, rows: tuple[int, ...], K: int, N: int, block: int, affine: bool = False
) -> None:
    inputs = linear_inputs(bits, rows, K, N, block, affine=affine)
    got = call(linear_session(library, bits, K, N, block, isa, affine=affine), inputs)
    want = quantized(inputs["x"], block) @ restored(inputs, bits).T
    assert got.shape == want.shape
    assert TOLERANCES["op", "float32"].accepts(measure(got, want.astype(np.float32)))


def restored(inputs, bits: int) -> np.ndarray:
    return weights(inputs["codes"], inputs["scales"], bits, inputs["x"].shape[-1], inputs.get("zero_points"))


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_matches_the_definition(library, isa: str, block: int, bits: int, affine: bool):
    """CPU-12、CPU-18：激活逐块拆成两个 int8 平面，其余等于 float64 的乘积，只差 float32 的舍入。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for rows, K, N in SHAPES:
        check(library, bits, isa, rows, K, N, block, affine)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_zeros(library, isa: str, bits: int):
    """CPU-12：整块是 0 的激活 scale 是 0，结果与没有那些列时的定义相同；全是 0 的行得 0。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    inputs = linear_inputs(bits, (6,), 640, 40, 32)
    inputs["x"][:, 64:160] = 0
    inputs["x"][4] = 0
    got = call(linear_session(library, bits, 640, 40, 32, isa), inputs)
    want = quantized(inputs["x"], 32) @ weights(inputs["codes"], inputs["scales"], bits, 640).T
    assert TOLERANCES["op", "float32"].accepts(measure(got, want.astype(np.float32)))
    assert not got[4].any()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape(library, data):
    """CPU-12、CPU-18：随机的格式、行数、宽度、块、指令集。"""
    rows, K = (data.draw(st.integers(1, most)) for most in (40, 400))
    # 只有一两个输出时，正负相消的那一个就是全部，差的平方对它的比没有意义；窄的在上面那张表里。
    N = data.draw(st.integers(16, 150))
    block, (bits, affine) = data.draw(st.sampled_from([32, 64, 128])), data.draw(st.sampled_from(FORMATS))
    check(library, bits, data.draw(st.sampled_from(library.isas)), (rows,), K, N, block, affine)


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("rows", [1, 40])
def test_kernel_is_more_accurate_than_onnxruntime(library, rows: int, block: int, bits: int, affine: bool):
    """CPU-12、CPU-18：激活留约 15 位：对没有舍入的激活，误差不到 MatMulNBits（int8 激活）的百分之一，后者又在它的容差之内。"""
    inputs = linear_inputs(bits, (rows,), 512, 96, block, affine=affine)
    exact = inputs["x"].astype(np.float64) @ restored(inputs, bits).T
    got = call(session_for(library, bits, 512, 96, block, "", 1, affine), inputs)
    assert_closer(got, onnxruntime_linear(inputs, bits, block), exact, bits)


def assert_closer(got: np.ndarray, other: np.ndarray, exact: np.ndarray, bits: int) -> None:
    assert np.linalg.norm(got - exact) < np.linalg.norm(other - exact) / 100
    assert tolerance("op", "float32", "int8" if bits == 8 else "int4").accepts(measure(got, other))


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("rows", [1, 300])
def test_result_does_not_depend_on_the_number_of_threads(library, rows: int, bits: int, affine: bool):
    """CPU-3：怎么切只看形状，1 个与 3 个线程的结果逐位相同。"""
    inputs = linear_inputs(bits, (rows,), 1024, 777, 32, affine=affine)
    sessions = [session_for(library, bits, 1024, 777, 32, "", threads, affine) for threads in (1, 3)]
    one, three = (call(session, inputs) for session in sessions)
    assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize(
    ("bits", "name", "change", "message"),
    [
        (8, "x", lambda a: a[:, :69], "x 是 [2, 69]，最后一维应为 K=70"),
        (8, "codes", lambda a: a[:4], "codes 是 [4, 3, 32]，应为 [5, 3, 32]"),
        (8, "codes", lambda a: a[:, :2], "codes 是 [5, 2, 32]，应为 [5, 3, 32]"),
        (8, "scales", lambda a: a[:, :2], "scales 是 [5, 2]，应为 [5, 3]"),
        (4, "codes", lambda a: a.repeat(2, -1), "dsx::Int4Linear：codes 是 [5, 3, 32]，应为 [5, 3, 16]"),
    ],
)
def test_wrong_shapes_are_refused(library, bits: int, name: str, change, message: str):
    """CPU-4：形状不符，说明是哪个输入、应是什么；进程不崩。"""
    inputs = linear_inputs(bits, (2,), 70, 5, 32)
    inputs[name] = change(inputs[name])
    with pytest.raises(Exception, match=re.escape(message)):
        call(session_for(library, bits, 70, 5, 32), inputs)


def test_wrong_zero_points_are_refused(library):
    """CPU-4、CPU-18：零点的形状不符，说明是哪个输入、应是什么。"""
    inputs = linear_inputs(4, (2,), 70, 5, 32, affine=True)
    inputs["zero_points"] = inputs["zero_points"][:, :1]
    with pytest.raises(Exception, match=re.escape("Int4AffineLinear：zero_points 是 [5, 1]，应为 [5, 2]")):
        call(session_for(library, 4, 70, 5, 32, "", 1, True), inputs)
    experts = experts_inputs(4, 3, 64, 32, 4, 2, 32, affine=True)
    experts["down_zero_points"] = experts["down_zero_points"][:3]
    with pytest.raises(Exception, match=re.escape("down_zero_points 是 [3, 64, 1]，应为 [4, 64, 1]")):
        call(experts_session(library, 4, 2, 32, affine=True), experts)


def test_symmetric_zero_points_change_nothing(library):
    """CPU-18：零点都是 8 的，与没有零点的逐位相同。"""
    inputs = linear_inputs(4, (9,), 320, 37, 32, affine=True)
    inputs["zero_points"] = np.full_like(inputs["zero_points"], 0x88)
    got = call(session_for(library, 4, 320, 37, 32, "", 1, True), inputs)
    del inputs["zero_points"]
    assert got.tobytes() == call(session_for(library, 4, 320, 37, 32), inputs).tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_unsupported_blocks_are_refused_when_the_session_is_made(library, bits: int):
    """CPU-4：没有 kernel 的块大小，建会话时就拒绝。"""
    with pytest.raises(Exception, match="block_size=16"):
        linear_session(library, bits, 64, 4, 16)


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("isa", ISAS)
def test_experts_match_the_definition(library, isa: str, block: int, bits: int, affine: bool):
    """CPU-13、CPU-18：选中的专家逐个与定义相同：激活两次拆成两个 int8 平面，其余只差 float32 的舍入；一个 token、多个 token、没有 token。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for N, D, inner, E, k in ((1, 128, 256, 8, 3), (0, 128, 128, 2, 1), (30, 256, 128, 5, 2)):
        inputs = experts_inputs(bits, N, D, inner, E, k, block, affine=affine)
        got = call(experts_session(library, bits, k, block, isa, affine=affine), inputs)
        assert_experts(got, experts_reference(inputs, bits, k, block))


def assert_experts(got: np.ndarray, want: np.ndarray) -> None:
    """第二次舍入前的末位误差会让个别激活进到相邻的一档，即块里最大值的 3e-5：所以用 float32 逐层累计的那一行容差。"""
    assert got.shape == want.shape
    assert got.size == 0 or TOLERANCES["logits", "float32"].accepts(measure(got, want))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_experts_of_any_shape(library, data):
    """CPU-13、CPU-18：随机的格式、token 数、宽度、专家数、块、指令集。"""
    block = data.draw(st.sampled_from([32, 64, 128]))
    N, E = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    D, inner = (block * data.draw(st.integers(1, 3)) for _ in range(2))
    k, (bits, affine) = data.draw(st.integers(1, E)), data.draw(st.sampled_from(FORMATS))
    inputs = experts_inputs(bits, N, D, inner, E, k, block, affine=affine)
    isa = data.draw(st.sampled_from(library.isas))
    got = call(experts_session(library, bits, k, block, isa, affine=affine), inputs)
    assert_experts(got, experts_reference(inputs, bits, k, block))


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("N", [1, 40])
def test_experts_are_more_accurate_than_onnxruntime(library, N: int, bits: int, affine: bool):
    """CPU-13、CPU-18：对没有舍入的激活，误差不到 QMoE（int8 激活）的百分之一，后者又在它的容差之内。"""
    inputs = experts_inputs(bits, N, 256, 128, 6, 2, 32, affine=affine)
    got = call(experts_session(library, bits, 2, 32, affine=affine), inputs)
    exact = experts_reference(inputs, bits, 2, 32, exact=True)
    assert_closer(got, onnxruntime_experts(inputs, bits, 2, 32), exact, bits)


@pytest.mark.parametrize(("bits", "affine"), FORMATS)
@pytest.mark.parametrize("N", [1, 200])
def test_experts_do_not_depend_on_the_number_of_threads(library, N: int, bits: int, affine: bool):
    """CPU-3：各任务独占输出的几列，专家的次序固定，1 个与 3 个线程的结果逐位相同。"""
    inputs = experts_inputs(bits, N, 512, 256, 8, 4, 32, affine=affine)
    sessions = [experts_session(library, bits, 4, 32, "", threads, affine) for threads in (1, 3)]
    one, three = (call(session, inputs) for session in sessions)
    assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize(
    ("bits", "name", "change", "message"),
    [
        (8, "x", lambda a: a[:, :63], "D、I 要是 block_size=32 的倍数：x 是 [3, 63]"),
        (8, "log_weights", lambda a: a[:2], "log_weights 是 [2, 4]，应为 [3, 4]"),
        (8, "log_weights", lambda a: a[:, :1], "log_weights 是 [3, 1]，专家少于 k=2"),
        (8, "gate_up", lambda a: a[:, :63], "gate_up 是 [4, 63, 64]，应为 [4, 64, 64]"),
        (8, "gate_up_scales", lambda a: a[..., :1], "gate_up_scales 是 [4, 64, 1]，应为 [4, 64, 2]"),
        (8, "down", lambda a: a[0], "down 是 [64, 32]，应有 3 维"),
        (8, "down", lambda a: a[:3], "down 是 [3, 64, 32]，应为 [4, 64, 32]"),
        (8, "down_scales", lambda a: a[:, :1], "down_scales 是 [4, 1, 1]，应为 [4, 64, 1]"),
        (
            4,
            "gate_up",
            lambda a: a.repeat(2, -1),
            "dsx::Int4Experts：gate_up 是 [4, 64, 64]，应为 [4, 64, 32]",
        ),
        (4, "down", lambda a: a[..., :8], "D、I 要是 block_size=32 的倍数：x 是 [3, 64]，down 是 [4, 64, 8]"),
    ],
)
def test_wrong_expert_shapes_are_refused(library, bits: int, name: str, change, message: str):
    """CPU-4：形状不符，说明是哪个输入、应是什么；进程不崩。"""
    inputs = experts_inputs(bits, 3, 64, 32, 4, 2, 32)
    inputs[name] = change(inputs[name])
    with pytest.raises(Exception, match=re.escape(message)):
        call(experts_session(library, bits, 2, 32), inputs)
