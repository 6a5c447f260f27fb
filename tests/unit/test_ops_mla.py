"""ops/mla_attention.py：两种形式、自动选择、缓存写入，对照逐元素的 float64 循环。"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.mla_attention import cost_coefficients, fake, mla_attention, prefers_naive
from tests.models import TOLERANCE, distance

pytestmark = pytest.mark.unit

FORMS = ("absorb", "naive", "auto")


def make_inputs(B, S, H, dn, dr, dv, r, T, past, dtype=torch.float32, cache_dtype=None, seed=0):
    """随机输入；缓存里看不见的行是比正常值大得多的垃圾，读到就会露馅。"""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g)

    cache = rand(B, 1, T, r + dr)
    for b, length in enumerate(past):
        cache[b, :, length:] *= 100
    arrays = (rand(B, S, H, dn), rand(B, S, H, dr), rand(B, S, r), rand(B, S, dr))
    w = rand(H * (dn + dv), r) * r**-0.5
    return (
        *(a.to(dtype) for a in arrays),
        cache.to(cache_dtype or dtype),
        torch.tensor(past, dtype=torch.int64),
        w.to(dtype),
        (dn + dr) ** -0.5,
    )


def loops(q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, scale):
    """按定义逐个 query、逐个 key 算，不用掩码、不用 scatter；返回 o [B,S,H,dv] float64。"""
    q_nope, q_pe, c_kv, k_pe, cache, w = (
        t.double().numpy() for t in (q_nope, q_pe, c_kv, k_pe, kv_cache, w_kv_b)
    )
    B, S, H, dn = q_nope.shape
    r = c_kv.shape[-1]
    w = w.reshape(H, -1, r)
    out = np.zeros((B, S, H, w.shape[1] - dn))
    for b in range(B):
        past = int(past_lens[b])
        keys = [(row[:r], row[r:]) for row in cache[b, 0, :past]] + list(zip(c_kv[b], k_pe[b], strict=True))
        for i in range(S):
            for h in range(H):
                scores, values = [], []
                for latent, rope in keys[: past + i + 1]:
                    kv = w[h] @ latent
                    scores.append(scale * (q_nope[b, i, h] @ kv[:dn] + q_pe[b, i, h] @ rope))
                    values.append(kv[dn:])
                p = [math.exp(s - max(scores)) for s in scores]
                out[b, i, h] = sum(pi * v for pi, v in zip(p, values, strict=True)) / sum(p)
    return out


@st.composite
def shapes(draw):
    """合法的形状与各序列互不相等的历史长度（含 0）。"""
    dims = {
        name: draw(st.integers(1, top))
        for name, top in {"B": 3, "S": 4, "H": 3, "dn": 5, "dr": 4, "dv": 5, "r": 7}.items()
    }
    T = draw(st.integers(dims["S"], 12))
    past = draw(st.lists(st.integers(0, T - dims["S"]), min_size=dims["B"], max_size=dims["B"]))
    return {**dims, "T": T, "past": past, "seed": draw(st.integers(0, 1000))}


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_every_form_equals_the_loops(shape):
    """absorb == naive == auto == 循环，任意形状与历史长度。"""
    inputs = make_inputs(**shape)
    want = loops(*inputs)
    for form in FORMS:
        assert distance(mla_attention(*inputs, form=form)[0], want) < TOLERANCE[torch.float32], form


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_cache_rows(shape, cache_dtype):
    """恰好写 past_lens..+S-1 这几行，内容是 [c_kv, k_pe]；其余逐位不变，传入的缓存也不变。"""
    inputs = make_inputs(**shape, cache_dtype=cache_dtype)
    c_kv, k_pe, before, past = inputs[2], inputs[3], inputs[4], inputs[5]
    want = before.clone()
    for b in range(shape["B"]):
        start = int(past[b])
        want[b, 0, start : start + shape["S"]] = torch.cat([c_kv[b], k_pe[b]], -1).to(cache_dtype)
    snapshot = before.clone()
    for form in FORMS:
        after = mla_attention(*inputs, form=form)[1]
        assert after.dtype == cache_dtype
        assert torch.equal(after, want)
    assert torch.equal(before, snapshot)


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_cache_means_rounded_latents(form, cache_dtype):
    """缓存 dtype 更窄时，结果等于把 latent（含本次新写的）先舍入再做 float32 注意力。"""
    inputs = make_inputs(2, 3, 2, 6, 4, 5, 8, 11, [0, 7], cache_dtype=cache_dtype)
    o, _ = mla_attention(*inputs, form=form)
    rounded = list(inputs)
    for i in (2, 3, 4):
        rounded[i] = inputs[i].to(cache_dtype).float()
    assert o.dtype == torch.float32
    assert distance(o, loops(*rounded)) < TOLERANCE[torch.float32]
    assert distance(o, loops(*inputs)) > 1e-5, "舍入应当看得出来，否则这个测试没有用"


@pytest.mark.parametrize("form", FORMS)
def test_float16(form):
    """float16 输入与 float64 循环相符。"""
    inputs = make_inputs(2, 4, 3, 24, 16, 20, 40, 30, [3, 26], dtype=torch.float16)
    o, cache = mla_attention(*inputs, form=form)
    assert (o.dtype, cache.dtype) == (torch.float16, torch.float16)
    assert distance(o, loops(*inputs)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("form", ["absorb", "naive"])
def test_large_scores_do_not_overflow_in_float16(form):
    """点积远超 65504 也不溢出：QK 与 softmax 在 float32 里。"""
    inputs = list(make_inputs(1, 2, 2, 8, 4, 8, 16, 12, [6], dtype=torch.float16))
    inputs[0] *= 100
    inputs[2] *= 300
    inputs[4][..., :16] *= 300
    inputs[4][:, :, 6:] = 0
    inputs[7] = 1e-5
    k = inputs[2][0, 0].float() @ inputs[6][:8].float().T
    assert (inputs[0][0, 0, 0].float() * k).abs().sum() > 65504, "输入不够大，测试没有用"
    o, _ = mla_attention(*inputs, form=form)
    assert torch.isfinite(o).all()
    assert distance(o, loops(*inputs)) < TOLERANCE[torch.float16]


def test_huge_but_equal_scores_stay_uniform():
    """减最大值的 softmax：分数全都很大且相等时权重均匀，而不是 NaN。"""
    inputs = list(make_inputs(1, 1, 1, 4, 2, 3, 4, 5, [4]))
    inputs[1] = torch.full_like(inputs[1], 1e6)
    inputs[0] = torch.zeros_like(inputs[0])
    inputs[3] = torch.full_like(inputs[3], 1e6)
    inputs[4][..., 4:] = 1e6
    assert distance(mla_attention(*inputs, form="absorb")[0], loops(*inputs)) < TOLERANCE[torch.float32]


dims = st.integers(1, 600)


@given(S=st.integers(1, 5000), T=st.integers(1, 200_000), dn=dims, dr=dims, dv=dims, r=dims)
def test_prefers_naive_is_the_cheaper_form(S, T, dn, dr, dv, r):
    """判据等价于直接比较两种形式的乘加次数。"""
    expand = r * (dn + dv)
    naive = T * expand + S * T * (dn + dr + dv)
    absorb = S * expand + S * T * (2 * r + dr)
    assert prefers_naive(S, T, dn, dv, r) == (naive < absorb)
    assert cost_coefficients(dn, dv, r) == (expand, 2 * r - dn - dv)


def test_prefers_naive_for_deepseek_v3():
    """V3 的形状：解码走 absorb，整段 prefill 走 naive。"""
    for T in (128, 4096, 131072):
        assert not prefers_naive(1, T, 128, 128, 512)
        assert prefers_naive(T, T, 128, 128, 512)


def test_auto_is_bitwise_one_of_the_two():
    """auto 与它选中的那一种逐位相等，两边都试到。"""
    seen = set()
    for S, T in ((1, 12), (12, 12)):
        inputs = make_inputs(1, S, 2, 6, 4, 5, 16, T, [0])
        chosen = "naive" if prefers_naive(S, T, 6, 5, 16) else "absorb"
        seen.add(chosen)
        assert torch.equal(mla_attention(*inputs)[0], mla_attention(*inputs, form=chosen)[0])
    assert seen == {"naive", "absorb"}


@pytest.mark.parametrize("form", FORMS)
def test_fake_matches_eager(form):
    """形状推导与 eager 的形状、dtype、步长一致。"""
    for dtype, cache_dtype in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16)):
        inputs = make_inputs(2, 3, 2, 6, 4, 5, 8, 11, [0, 7], dtype=dtype, cache_dtype=cache_dtype)
        with FakeTensorMode() as mode:
            shapes = fake(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs))
        for got, want in zip(mla_attention(*inputs, form=form), shapes, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize(("S", "past"), [(1, [0, 7]), (3, [0, 7]), (11, [0, 0])])
def test_opcheck(S, past):
    """torch 自带的算子检查：schema、fake、动态形状。"""
    torch.library.opcheck(torch.ops.dsx.mla_attention.default, make_inputs(2, S, 2, 6, 4, 5, 8, 11, past))
