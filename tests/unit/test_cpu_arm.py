"""aarch64 的 kernel：交叉编译，在 qemu 里逐指令集与参考实现比；选中的指令集由 CPU 定，每个只用自己的指令。不计时。

比法与 x86 的各指令集相同，容差也是同一张表。缺交叉编译器或 qemu 时跳过，说明原因。
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tests.cpu_build import builder
from tests.cpu_driver import CPUS, Driver, arm_driver, attention, experts, indexer, linear
from tests.quant_node import experts_inputs, experts_reference, linear_inputs, quantized
from tests.sparse_node import SHAPES as SPARSE_SHAPES
from tests.sparse_node import attention_inputs, index_inputs
from tests.unit.test_cpu_int8_attention import SEVERAL_PARTS, V3, cached, exact
from tests.unit.test_cpu_library import assert_attends, assert_same_rows, poisoned, reference
from tests.unit.test_cpu_quant import FORMATS, assert_experts, restored
from tests.unit.test_cpu_quant import SHAPES as QUANT_SHAPES
from tests.unit.test_cpu_sparse import (
    assert_attends_to_the_chosen,
    assert_selects,
    poisoned_index,
    unchosen_poisoned,
)
from tools.cpu_node import CACHES, COMPUTES, ODD, WIDE, make_inputs

pytestmark = pytest.mark.unit

ISAS = tuple(CPUS)
#: 整数点积的各份：乘积是整数，合成 float 的次序相同。
INTEGERS = ("neon", "neon_dotprod", "neon_i8mm")
BLOCKS, BITS = (32, 64, 128), (8, 4)
#: (S, H, T, past_lens)：空缓存、长度悬殊的解码、多 token 验证、跨块的 prefill。
SHAPES = ((1, 4, 8, (0,)), (1, 4, 300, (299, 17)), (5, 4, 40, (0, 1, 35)), (70, 3, 200, (100,)))
SELECTED = ("indices", "counts", "index_cache_out")


@pytest.fixture(scope="module")
def driver() -> Driver:
    """交叉编译好的 driver，在 qemu 里跑。"""
    return arm_driver()


def rounded(driver: Driver, isa: str, inputs: dict[str, np.ndarray]) -> str | None:
    """注意力的乘数舍入成什么。"""
    return CpuLibrary(driver.library, ISAS, isa).factors(inputs["kv_cache"].dtype.name)


def test_a_missing_cross_compiler_is_said(tmp_path, monkeypatch):
    """CPU-25：没有交叉编译器、没有这种处理器，都说明原因与怎么办，不去编译成本机的。"""
    with pytest.raises(builder().Unavailable, match="不会为 riscv64 交叉编译，能用：aarch64"):
        builder().build(target="riscv64")
    cmake = tmp_path / "cmake"
    cmake.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(builder().Unavailable, match="apt-get install g\\+\\+-aarch64-linux-gnu"):
        builder().build(target="aarch64")


@pytest.mark.slow
def test_the_cpu_decides(driver):
    """CPU-25：各种 CPU 上能用的指令集，缺省取第一个；driver 与真的算子库说的相同；没有的拒绝，说明能用哪些。"""
    everything = ["neon_i8mm", "neon_bf16", "neon_dotprod", "neon", "plain"]
    for cpu, expected in (
        ("cortex-a57", ["neon", "plain"]),
        ("neoverse-n1", ["neon_dotprod", "neon", "plain"]),
        ("neoverse-v1", everything),
        ("max", everything),
    ):
        assert driver.isas(cpu) == expected
        assert driver.isas(cpu, "--library", str(driver.library)) == expected
    some = attention(make_inputs("float32", "float32", 1, 2, 8, (3,), **ODD)).encoded()
    for isa, cpu in (("avx2", "max"), ("neon_dotprod", "cortex-a57"), ("neon_i8mm", "neoverse-n1")):
        refused = driver.start(isa=isa, cpu=cpu, given=some)
        assert refused.returncode == 1
        assert f"DSX_CPU_ISA={isa} 不可用，这台机器能用：" in refused.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["absorb", "naive"])
@pytest.mark.parametrize("isa", ISAS)
def test_attention(driver, isa: str, form: str):
    """CPU-1、CPU-2、CPU-25：每种计算与缓存 dtype、各种形状；长度之外的不读，原地与否相同。"""
    cases = [
        make_inputs(dtype, cache, *shape, **widths)
        for dtype, cache, shape, widths in itertools.product(COMPUTES, CACHES, SHAPES, (ODD, WIDE))
    ]
    requests = [attention(inputs, form) for inputs in cases]
    requests += [attention(poisoned(inputs), form, in_place=False) for inputs in cases]
    found = driver.run(isa, requests)
    for inputs, got, again in zip(cases, found, found[len(cases) :], strict=False):
        assert_attends(got, inputs, rounded(driver, isa, inputs))
        assert_same_rows(again, got, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_int8_weights_and_rows(driver, isa: str):
    """CPU-16、CPU-25：int8 的 w_kv_b 每种块；CPU-1：各种大小的行写进 int8 缓存，字节与参考实现相同。"""
    cases = []
    for (block, r), cache in itertools.product(((32, 96), (64, 64), (128, 128)), CACHES):
        widths = {**WIDE, "dn": 6, "dv": 5, "r": r, "weight_dtype": "int8", "weight_block": block}
        cases += [
            make_inputs("float32", cache, S, 3, 90, past, **widths) for S, past in ((1, (80, 3)), (70, (20,)))
        ]
    rows = make_inputs("float32", "int8", 400, 1, 400, (0,), **ODD)
    spread = np.exp2(np.random.default_rng(0).uniform(-100, 80, (1, 400, 1))).astype(np.float32)
    rows |= {name: rows[name] * spread for name in ("c_kv", "k_pe")}
    rows["c_kv"][0, 3:40, 0] = np.exp2(np.arange(-20, 17)) * 127
    found = driver.run(
        isa, [attention(inputs, form) for form in ("absorb", "naive") for inputs in [*cases, rows]]
    )
    for inputs, got in zip([*cases, rows] * 2, found, strict=True):
        if inputs is rows:
            assert np.array_equal(got[1].astype(np.float32), reference(inputs)[1])
        else:
            assert_attends(got, inputs, rounded(driver, isa, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_int8_cache(driver, isa: str):
    """CPU-17、CPU-25：误差不超过写明的上界；query 里有 NaN 的那一个头是 NaN，别的头不受影响。"""
    cases = [
        cached(make_inputs("float32", "int8", S, H, T, past, **widths), spread)
        for widths, (S, H, T, past), spread in (
            (V3, (1, 16, 700, (699, 130)), 0.0),
            (V3, (3, 5, 300, (297, 0)), 20.0),
            (SEVERAL_PARTS, (2, 3, 150, (140,)), 3.0),
            (ODD, (9, 1, 270, (0, 261)), 0.0),
        )
    ]
    sick = cases[1] | {"q_nope": cases[1]["q_nope"].copy()}
    sick["q_nope"][0, 1, 2, 3] = np.nan
    *found, (broken, _) = driver.run(isa, [attention(inputs, "absorb") for inputs in [*cases, sick]])
    for inputs, (o, cache) in zip(cases, found, strict=True):
        want, bound = exact(inputs, cache)
        rounding = 1e-5 * max(1.0, np.sqrt((want**2).mean()))
        assert (np.abs(o - want) <= bound + rounding).all(), np.abs(o - want).max()
    whole = found[1][0].copy()
    assert np.isnan(broken[0, 1, 2]).all()
    whole[0, 1, 2] = np.nan
    assert np.array_equal(broken, whole, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_linear_layers(driver, isa: str):
    """CPU-12、CPU-18、CPU-25：激活逐块拆成两个 int8 平面，其余等于 float64 的乘积，只差 float32 的舍入。"""
    cases = [
        (linear_inputs(bits, rows, K, N, block, affine=affine), bits, block)
        for (bits, affine), block, (rows, K, N) in itertools.product(FORMATS, BLOCKS, QUANT_SHAPES)
    ]
    found = driver.run(isa, [linear(*case) for case in cases])
    for (inputs, bits, block), (got,) in zip(cases, found, strict=True):
        want = quantized(inputs["x"], block) @ restored(inputs, bits).T
        assert TOLERANCES["op", "float32"].accepts(measure(got, want.astype(np.float32)))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_experts(driver, isa: str):
    """CPU-13、CPU-18、CPU-25：选中的专家逐个与定义相同；一个 token、多个 token、没有 token。"""
    shapes = ((1, 128, 256, 8, 3), (0, 128, 128, 2, 1), (30, 256, 128, 5, 2))
    cases = [
        (experts_inputs(bits, N, D, inner, E, k, block, affine=affine), bits, k, block)
        for (bits, affine), block, (N, D, inner, E, k) in itertools.product(FORMATS, BLOCKS, shapes)
    ]
    found = driver.run(isa, [experts(*case) for case in cases])
    for (inputs, bits, k, block), (got,) in zip(cases, found, strict=True):
        assert_experts(got, experts_reference(inputs, bits, k, block))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_sparse_attention(driver, isa: str):
    """CPU-14、CPU-15、CPU-25：选出同样的 key，只看选中的行；长度之外的、没有选中的不读。"""
    chosen = [
        index_inputs("float32", cache, *shape) for cache, shape in itertools.product(CACHES, SPARSE_SHAPES)
    ]
    chosen.append(index_inputs("float32", "int8", 2, 300, (280, 31), 64, 128))
    attended = [
        attention_inputs("float32", cache, S, T, past, H, 24, widths)
        for cache, widths in itertools.product(CACHES, (ODD, WIDE))
        for (S, T, past), H in zip(SPARSE_SHAPES[1:4], (70, 130, 3), strict=True)
    ]
    requests = [indexer(inputs, 24) for inputs in chosen]
    requests += [indexer(poisoned_index(inputs), 24, in_place=False) for inputs in chosen]
    requests += [attention(inputs) for inputs in attended]
    requests += [attention(unchosen_poisoned(inputs), in_place=False) for inputs in attended]
    found = iter(driver.run(isa, requests))
    first, again = ([next(found) for _ in chosen] for _ in range(2))
    for inputs, got, other in zip(chosen, first, again, strict=True):
        assert_selects(dict(zip(SELECTED, got, strict=True)), inputs, 24)
        assert np.array_equal(other[0], got[0])
    first, again = ([next(found) for _ in attended] for _ in range(2))
    for inputs, got, other in zip(attended, first, again, strict=True):
        assert_attends_to_the_chosen(got, inputs, rounded(driver, isa, inputs))
        assert other[0].tobytes() == got[0].tobytes()


@pytest.mark.slow
def test_variants_and_threads_agree_bit_for_bit(driver):
    """CPU-25、CPU-3：整数点积的三份逐位相同，int8 缓存上的注意力、选出的 key 也是；1 个与 3 个线程逐位相同，注意力也是。"""
    integers = [
        linear(linear_inputs(bits, (rows,), 1024, 77, 32), bits, 32) for bits in BITS for rows in (1, 3, 30)
    ]
    integers += [linear(linear_inputs(4, (9,), 1024, 77, 32, affine=True), 4, 32)]
    integers += [experts(experts_inputs(bits, 40, 256, 128, 6, 2, 64), bits, 2, 64) for bits in BITS]
    integers += [indexer(index_inputs("float32", "int8", S, 900, (880, 31), 33, 40), 100) for S in (1, 7)]
    integers += [attention(cached(make_inputs("float32", "int8", 2, 4, 900, (890, 3), **V3)), "absorb")]
    floats = [
        attention(make_inputs("float32", "bfloat16", 2, 4, 900, (890, 3), **WIDE), form)
        for form in ("absorb", "naive")
    ]
    answers = {}
    for isa, threads in itertools.product((*INTEGERS, "neon_bf16"), (1, 3)):
        found = driver.run(isa, [request.on(threads) for request in [*integers, *floats]])
        answers[isa, threads] = [array.tobytes() for outputs in found for array in outputs]
    for isa in (*INTEGERS, "neon_bf16"):
        assert answers[isa, 1] == answers[isa, 3]
    for isa in INTEGERS[1:]:
        assert answers[isa, 1] == answers["neon", 1]


@pytest.mark.slow
def test_without_undefined_behaviour():
    """CPU-4、CPU-25：UBSan 下每个指令集各跑一遍。aarch64 的 AddressSanitizer 在 qemu-user 里启动就崩，空的 main 也是，所以没有它。"""
    driver = arm_driver("undefined")
    requests = [
        attention(make_inputs("float32", cache, *shape, **widths), form, in_place)
        for cache, shape, widths, (form, in_place) in itertools.product(
            CACHES, SHAPES, (ODD, WIDE), (("absorb", True), ("naive", False))
        )
    ]
    for (bits, affine), block in itertools.product(FORMATS, BLOCKS):
        requests += [
            linear(linear_inputs(bits, *shape, block, affine=affine), bits, block) for shape in QUANT_SHAPES
        ]
        requests += [
            experts(experts_inputs(bits, N, 256, 128, 5, 2, block, affine=affine), bits, 2, block)
            for N in (1, 30)
        ]
    for cache, (S, T, past) in itertools.product(CACHES, SPARSE_SHAPES[1:4]):
        requests.append(indexer(index_inputs("float32", cache, S, T, past), 24, in_place=False))
        requests += [attention(attention_inputs("float32", cache, S, T, past, H, 24, ODD)) for H in (3, 70)]
    for isa in ISAS:
        driver.run(isa, [request.on(2) for request in requests])
