"""ops/int8_index.py：int8 的索引 key 一行字节与它代表的数，Hadamard 变换，舍入之后的打分。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.ops.int8_index import decode_keys, encode_keys, encode_query, hadamard, split_keys
from deepseek_export.ops.lightning_indexer import index_scores, lightning_indexer
from deepseek_export.parity.selection import mask_of

pytestmark = pytest.mark.unit


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(width=st.integers(1, 160), exponent=st.integers(-60, 60))
@settings(max_examples=60, deadline=None)
def test_rounding_is_half_a_step(width: int, exponent: int):
    """DSA-13：一行 di+3 字节；误差至多半个 scale，scale 是行内最大值的 1/127（向上至多大 1/16000）；全零还原成零。"""
    x = made(3, width, seed=width) * 2.0**exponent
    x[0] = 0
    rows = encode_keys(x)
    assert (rows.dtype, rows.shape) == (torch.int8, (3, width + 3))
    step = x.abs().amax(-1, keepdim=True) / 127 * (1 + 1 / 16000)
    assert ((decode_keys(rows) - x).abs() <= step / 2 * (1 + 1e-6)).all()
    assert not decode_keys(rows)[0].any()
    codes, scale = encode_query(x)
    assert torch.equal(codes * scale[:, None], decode_keys(rows))


@pytest.mark.parametrize(("width", "size"), [(128, 128), (24, 8), (20, 4), (7, 1), (1, 1)])
def test_hadamard_is_orthogonal(width: int, size: int):
    """DSA-13：点积不变；块的大小是宽度里最大的 2 的幂，每个数的绝对值都相同。"""
    matrix = hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), atol=1e-6, rtol=0)
    block = matrix[:size, :size].abs()
    torch.testing.assert_close(block, torch.full_like(block, size**-0.5))
    assert torch.count_nonzero(matrix) == width * size


def test_scores_are_exact_integers_times_scales():
    """DSA-13：乘积是整数，各头相加是唯一的舍入：与 float64 算的差不到 float32 的几个末位。"""
    q, w, cache = made(2, 3, 32, 128), made(2, 3, 32, seed=1), encode_keys(made(2, 1, 50, 128, seed=2))
    codes, scale = encode_query(q)
    keys, key_scale = split_keys(cache.squeeze(1))
    dots = np.einsum("bshd,btd->bsht", codes.numpy().astype(np.int64), keys.numpy().astype(np.int64))
    weights = (w * scale).double().numpy()
    want = (
        np.einsum("bsh,bsht->bst", weights, np.maximum(dots, 0)) * key_scale.double().numpy()[:, None, :, 0]
    )
    got = index_scores(q, w, cache).double().numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def agreement(
    q: torch.Tensor, w: torch.Tensor, keys: torch.Tensor, int8: torch.Tensor, rotate: bool
) -> float:
    """选中的集合对没有舍入的有多一致。"""
    T, past = keys.shape[2], torch.tensor([keys.shape[2] - 1])
    matrix = hadamard(keys.shape[-1]) if rotate else torch.eye(keys.shape[-1])
    last = keys[:, 0, -1:]
    exact, _, _ = lightning_indexer(q, w, last, keys, past, 64)
    mine, _, _ = lightning_indexer(q @ matrix, w, last @ matrix, encode_keys(int8 @ matrix), past, 64)
    return float((mask_of(exact.numpy(), T) * mask_of(mine.numpy(), T)).sum()) / 64


def test_the_transform_spreads_outliers():
    """DSA-13：几个通道特别大的时候，先变换再舍入选得准得多；没有的时候两者都准。"""
    w = made(1, 1, 32, seed=3)
    q, keys = made(1, 1, 32, 128), made(1, 1, 2000, 128, seed=4)
    assert min(agreement(q, w, keys, keys, rotate) for rotate in (True, False)) > 0.9
    q[..., 5] /= 50
    keys[..., 5] *= 200
    plain, rotated = (agreement(q, w, keys, keys, rotate) for rotate in (False, True))
    assert rotated > plain


def test_few_keys_are_not_ranked():
    """DSA-13：T 不超过名额时一个分数也不算，缓存照写。"""
    q, w, k = made(1, 2, 4, 16), made(1, 2, 4), made(1, 2, 16, seed=1)
    cache = torch.zeros(1, 1, 9, 19, dtype=torch.int8)
    indices, counts, written = lightning_indexer(q * float("nan"), w, k, cache, torch.tensor([3]), 9)
    assert counts.tolist() == [[4, 5]]
    assert indices[0, 1].tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1]
    assert torch.equal(written[0, 0, 3:5], encode_keys(k)[0])
