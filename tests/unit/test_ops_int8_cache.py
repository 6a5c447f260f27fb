"""ops/int8_cache.py：一行字节与它代表的数，边界值，以及 int8 缓存上的注意力。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deepseek_export.benchmark.depth import random_rows
from deepseek_export.ops.int8_cache import LATENT_CODES, ROPE_CODES, decode_rows, encode_rows, padded_rows
from deepseek_export.ops.mla_attention import mla_attention, read_cache, update_cache
from tests.models import TOLERANCE, distance
from tests.unit.test_ops_mla import FORMS, loops, make_inputs

pytestmark = pytest.mark.unit

#: 不饱和、不下溢的范围。
LARGEST, LEAST = 2.0**112, 2.0**-80


def rows_of(values: np.ndarray, r: int) -> torch.Tensor:
    x = torch.from_numpy(values)
    return encode_rows(x[..., :r], x[..., r:])


@given(data=st.data(), r=st.integers(1, 40), dr=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_rounding_is_half_a_step(data, r: int, dr: int):
    """MLA-7：误差至多半个 scale；scale 是行内最大值除以码的最大值，向上至多大 1/16256；码不超界。"""
    span = st.one_of(st.just(0.0), st.floats(LEAST, LARGEST, width=32))
    magnitude = np.float32(data.draw(span))
    unit = arrays.arrays(np.float32, (3, r + dr), elements=st.floats(-1, 1, width=32))
    values = data.draw(unit) * magnitude
    rows = rows_of(values, r)
    assert (rows.dtype, rows.shape) == (torch.int8, (3, r + 2 * dr + 6))
    decoded = decode_rows(rows, r)
    assert decoded.dtype == torch.float32
    for part, codes in ((slice(0, r), LATENT_CODES), (slice(r, None), ROPE_CODES)):
        x, y = values[:, part].astype(np.float64), decoded[:, part].double().numpy()
        step = np.abs(x).max(-1, keepdims=True) / codes * (1 + 1 / 16000)
        assert (np.abs(x - y) <= np.maximum(step / 2, 2.0**-112)).all()
    assert (rows[:, : r + dr] >= -LATENT_CODES).all()


def test_decoding_rounds_at_most_once():
    """MLA-7：latent 在 float32 里没有舍入，旋转部分只有一次：与 float64 算出再舍入的逐位相同，所以各个实现必然一致。"""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((500, 72)).astype(np.float32) * np.exp(rng.uniform(-60, 60, (500, 1)))
    rows = rows_of(values.astype(np.float32), 64)
    raw = rows.numpy().astype(np.float64)
    scale = (raw[:, -6::3] * 256 + raw[:, -5::3]) * 2.0 ** raw[:, -4::3]
    want = np.concatenate(
        [raw[:, :64] * scale[:, :1], (raw[:, 64:72] * 256 + raw[:, 72:80]) * scale[:, 1:]], -1
    )
    decoded = decode_rows(rows, 64).numpy()
    assert np.array_equal(decoded[:, :64].astype(np.float64), want[:, :64])
    assert np.array_equal(decoded, want.astype(np.float32))


def test_edges():
    """MLA-7：全零的行与没写过的缓存都是零；最大值取到最大的码；太大（含无穷）饱和，太小归零；任何字节都是有限的数。"""
    assert not decode_rows(encode_rows(torch.zeros(2, 5), torch.zeros(2, 3)), 5).any()
    assert not decode_rows(torch.zeros(2, 5 + 6 + 6, dtype=torch.int8), 5).any()
    exact = torch.tensor([[127.0, -127.0, 1.0]])
    rows = encode_rows(exact, torch.tensor([[-32512.0, 32512.0, 128.0]]))
    assert rows.tolist() == [[127, -127, 1, -127, 127, 1, 0, 0, -128, 64, 0, -14, 64, 0, -14]]
    assert torch.equal(decode_rows(rows, 3)[:, :3], exact)
    huge = decode_rows(encode_rows(torch.tensor([[3e38, -float("inf"), 1.0]]), torch.tensor([[3e38]])), 3)
    assert huge.isfinite().all()
    assert huge[0, 0] == -huge[0, 1] > 1e34
    assert not decode_rows(encode_rows(torch.tensor([[1e-45, -1e-38]]), torch.tensor([[1e-45]])), 2).any()
    garbage = torch.randint(-128, 128, (1000, 22), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert decode_rows(garbage, 8).isfinite().all()


def test_padded_rows_hold_the_same_bytes():
    """MLA-7：末尾补零的行，前面的字节相同，还原出同样的数；写进补过零的缓存也是。"""
    g = torch.Generator().manual_seed(0)
    c_kv, k_pe, past = (
        torch.randn(2, 3, 20, generator=g),
        torch.randn(2, 3, 6, generator=g),
        torch.tensor([0, 4]),
    )
    rows = encode_rows(c_kv, k_pe)
    padded = padded_rows(rows, 48)
    assert torch.equal(padded[..., :38], rows)
    assert not padded[..., 38:].any()
    assert torch.equal(decode_rows(padded, 20, 6), decode_rows(rows, 20))
    assert padded_rows(rows, 38) is rows
    narrow, wide = (torch.zeros(2, 1, 9, width, dtype=torch.int8) for width in (38, 48))
    written = [update_cache(c_kv, k_pe, cache, past) for cache in (narrow, wide)]
    assert torch.equal(padded_rows(written[0], 48), written[1])
    values = [read_cache(cache, 20, 6, torch.float32) for cache in written]
    assert torch.equal(*values)


def test_rows_made_for_timing_are_ordinary_numbers():
    """``dsx bench`` 填的 int8 缓存还原出来与标准正态同样大小。"""
    rows = random_rows(np.random.default_rng(0), (1000, 40 + 2 * 8 + 6), np.dtype(np.int8))
    decoded = decode_rows(torch.from_numpy(rows), 40)
    for part in (decoded[:, :40], decoded[:, 40:]):
        assert 0.5 < part.std() < 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_reads_the_rounded_latents(form, dtype):
    """MLA-7：int8 缓存上的注意力等于把 latent（含本次新写的）先舍入，再做通常的注意力。"""
    inputs = list(make_inputs(2, 3, 2, 6, 4, 5, 8, 11, [0, 7], dtype=dtype))
    plain = inputs[4].float()
    inputs[4] = encode_rows(plain[..., :8], plain[..., 8:])
    o, cache = mla_attention(*inputs, form=form)
    assert (o.dtype, cache.dtype, cache.shape) == (dtype, torch.int8, (2, 1, 11, 22))
    new = decode_rows(encode_rows(inputs[2], inputs[3]), 8)
    assert torch.equal(decode_rows(cache[1, 0, 7:10], 8), new[1])
    rounded = list(inputs)
    rounded[2], rounded[3], rounded[4] = new[..., :8], new[..., 8:], decode_rows(inputs[4], 8)
    assert distance(o, loops(*rounded)) < TOLERANCE[dtype]
