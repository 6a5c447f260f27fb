"""int8 缓存上的注意力：整数点积，误差不超过写明的上界；各指令集相同，与线程数、分块无关；不是有限的数不会变成看似正常的数。"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from deepseek_export.ops.int8_cache import decode_rows, encode_rows
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tools.cpu_node import ODD, SCALE, call, make_inputs, make_session

pytestmark = pytest.mark.unit

ISAS = ("plain", "avx2", "avx_vnni", "avx512")
#: V3 的宽度；跨几段、各段都不满的宽度；小得不满一个向量的。
V3 = {"dn": 16, "dr": 64, "dv": 16, "r": 512}
SEVERAL_PARTS = {"dn": 5, "dr": 270, "dv": 7, "r": 590}
#: 一段里 query 拆成两个平面的误差与段内最大绝对值之比，一格里概率的也是：半个低位，1 / (2 · 127 · 254)。
HALF_STEP = 1 / 64516
PART = 256


@functools.cache
def session_for(library, isa: str = "", threads: int = 1):
    return make_session(library, "float32", "int8", isa, "absorb", threads)


def cached(inputs: dict[str, np.ndarray], spread: float = 0.0) -> dict[str, np.ndarray]:
    """缓存里的行换成真的编码出来的；``spread`` 是各行的大小相差多少个 2 的幂。"""
    r, rng = inputs["c_kv"].shape[-1], np.random.default_rng(7)
    shape = inputs["kv_cache"].shape
    dr = inputs["k_pe"].shape[-1]
    rows = rng.standard_normal((*shape[:-1], r + dr)).astype(np.float32)
    rows *= np.exp2(rng.uniform(-spread, 0, (*shape[:-1], 1))).astype(np.float32)
    made = torch.from_numpy(rows)
    return inputs | {"kv_cache": encode_rows(made[..., :r], made[..., r:]).numpy()}


def exact(inputs: dict[str, np.ndarray], cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """同一份字节的缓存上 float64 的结果，与 CPU-17 允许的误差上界。"""
    B, S, H, dn = inputs["q_nope"].shape
    r = inputs["c_kv"].shape[-1]
    weights = inputs["w_kv_b"].astype(np.float64).reshape(H, -1, r)
    rows = decode_rows(torch.from_numpy(cache), r).double().numpy()[:, 0]
    codes = np.abs(cache[:, 0, :, :r].astype(np.float64))
    scales = np.abs(rows[..., :r]).max(-1) / np.maximum(codes.max(-1), 1)
    o, bound = np.zeros((2, B, S, H, weights.shape[1] - dn))
    for b, s, h in np.ndindex(B, S, H):
        seen = inputs["past_lens"][b] + s + 1
        keys = rows[b, :seen]
        q = SCALE * np.concatenate([inputs["q_nope"][b, s, h] @ weights[h, :dn], inputs["q_pe"][b, s, h]])
        scores = keys @ q
        p = np.exp(scores - scores.max())
        p /= p.sum()
        wrong = np.zeros(seen)
        for begin, end in ((0, r), (r, len(q))):
            for part in range(begin, end, PART):
                mine = slice(part, min(part + PART, end))
                wrong += np.abs(q[mine]).max() * HALF_STEP * np.abs(keys[:, mine]).sum(-1)
        spread = np.expm1(2 * wrong.max())
        context = spread * (p @ np.abs(keys[:, :r])) + (p * scales[b, :seen]).max() * HALF_STEP * codes[
            b, :seen
        ].sum(0)
        o[b, s, h] = weights[h, dn:] @ (p @ keys[:, :r])
        bound[b, s, h] = np.abs(weights[h, dn:]) @ context
    return o, bound


@pytest.mark.parametrize("isa", ISAS)
def test_error_stays_below_the_stated_bound(library, isa: str):
    """CPU-17：除了 query 与概率的两次拆分没有别的误差（只差 float32 的舍入）；各种宽度、深度、头数，各行的大小悬殊的也是。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for widths, (S, H, T, past), spread in (
        (V3, (1, 16, 700, (699, 130)), 0.0),
        (V3, (3, 5, 300, (297, 0)), 20.0),
        (SEVERAL_PARTS, (2, 3, 150, (140,)), 3.0),
        (ODD, (9, 1, 270, (0, 261)), 0.0),
    ):
        inputs = cached(make_inputs("float32", "int8", S, H, T, past, **widths), spread)
        o, cache = call(session_for(library, isa), inputs)
        want, bound = exact(inputs, cache)
        rounding = 1e-5 * max(1.0, np.sqrt((want**2).mean()))
        assert (np.abs(o - want) <= bound + rounding).all(), np.abs(o - want).max()


def test_every_isa_agrees(library):
    """CPU-17：整数的乘积各指令集相同，只有 float32 的舍入与指数函数的末位不同。"""
    inputs = cached(make_inputs("float32", "int8", 2, 8, 600, (590, 3), **V3))
    first, *others = (call(session_for(library, isa), inputs)[0] for isa in library.isas)
    for other in others:
        assert TOLERANCES["op", "int8"].accepts(measure(other, first))


def test_result_does_not_depend_on_the_number_of_threads(library):
    """CPU-3、CPU-17：1 个与 3 个线程逐位相同。"""
    inputs = cached(make_inputs("float32", "int8", 2, 4, 900, (890, 3), **V3))
    one, three = (call(session_for(library, "", threads), inputs)[0] for threads in (1, 3))
    assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q_nope", "q_pe"])
def test_what_is_not_finite_stays_so(library, isa: str, value: float, name: str):
    """CPU-17：query 里有 NaN 或无穷，那一个头的结果是 NaN，别的头、别的 token 不受影响。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    inputs = cached(make_inputs("float32", "int8", 2, 6, 90, (80,), **V3))
    want = call(session_for(library, isa), inputs)[0]
    inputs[name][0, 1, 2, 3] = value
    got = call(session_for(library, isa), inputs)[0]
    assert np.isnan(got[0, 1, 2]).all()
    got[0, 1, 2] = want[0, 1, 2]
    assert got.tobytes() == want.tobytes()
