"""C++ 算子库的稀疏注意力：逐指令集、逐 dtype 选出同样的 key，只读选中的行；越界的下标拒绝而不崩溃。"""

from __future__ import annotations

import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.ops.lightning_indexer import index_scores, lightning_indexer
from deepseek_export.ops.mla_attention import mla_attention
from deepseek_export.ops.sparse_mla_attention import sparse_mla_attention
from deepseek_export.parity.measures import measure
from deepseek_export.parity.selection import Ranking, mask_of
from deepseek_export.parity.tolerances import SELECTION_BAND, TOLERANCES, coarser
from tests.sparse_node import SHAPES, attend, attention_inputs, index_inputs, select
from tools.cpu_node import CACHES, COMPUTES, ODD, SCALE, WIDE

pytestmark = pytest.mark.unit

ISAS = ("plain", "avx2", "avx_vnni", "avx512", "avx512_bf16")
FLOATS = ("float32", "float16", "bfloat16")


def tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_selection(library: CpuLibrary, inputs: dict[str, np.ndarray], topk: int, isa: str) -> None:
    """选中的集合合乎契约；长度之外的行填 NaN（int8 填任意字节）也不变。"""
    got = select(library, inputs, topk, isa)
    assert_selects(got, inputs, topk)
    again = select(library, poisoned_index(inputs), topk, isa, in_place=False)
    assert np.array_equal(again["indices"], got["indices"])


def assert_selects(got: dict[str, np.ndarray], inputs: dict[str, np.ndarray], topk: int) -> None:
    """缓存逐位相同；选中的集合除了并列带之内的与参考实现相同，形式合乎契约。"""
    indices, counts, cache = lightning_indexer(*map(tensor, inputs.values()), topk)
    assert np.array_equal(got["counts"], counts.numpy())
    assert np.array_equal(got["index_cache_out"].astype(np.float32), cache.float().numpy())
    for row, count in zip(got["indices"].reshape(-1, topk), got["counts"].flat, strict=True):
        assert (np.diff(row[:count]) > 0).all()
        assert (row[count:] == -1).all()
    T, S = inputs["index_cache"].shape[2], inputs["q"].shape[1]
    last = tensor(inputs["past_lens"])[:, None] + torch.arange(S)
    scores = index_scores(tensor(inputs["q"]), tensor(inputs["w"]), cache)
    scores = scores.masked_fill(torch.arange(T) > last[:, :, None], float("-inf"))
    mine, want = mask_of(got["indices"], T), mask_of(indices.numpy(), T)
    kept, _ = Ranking(scores, topk).without_ties(mine, want, SELECTION_BAND["float32"])
    assert np.array_equal(kept, want)


def poisoned_index(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``past_lens`` 之后的索引 key 填 NaN，int8 填任意字节。"""
    changed = inputs | {"index_cache": inputs["index_cache"].copy()}
    for b, past in enumerate(inputs["past_lens"]):
        beyond = changed["index_cache"][b, :, past:]
        beyond[:] = (
            np.nan if beyond.dtype != np.int8 else np.random.default_rng(b).integers(-128, 128, beyond.shape)
        )
    return changed


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_selects_the_same(library, isa: str):
    """CPU-14：每种计算与缓存 dtype、各种形状；每个指令集都强制跑到。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for dtype in FLOATS:
        for cache_dtype in CACHES:
            for shape in SHAPES:
                check_selection(library, index_inputs(dtype, cache_dtype, *shape), 24, isa)
    # 发布的宽度：头数、头宽都是 int8 kernel 一块的倍数，正好走满。
    check_selection(library, index_inputs("float32", "int8", 2, 300, (280, 31), 64, 128), 24, isa)


@given(
    S=st.integers(1, 20),
    extra=st.integers(0, 900),
    heads=st.integers(1, 40),
    width=st.integers(1, 40),
    topk=st.integers(1, 300),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_any_selection(library, S: int, extra: int, heads: int, width: int, topk: int, data):
    """CPU-14：随机形状、名额、长度与指令集。"""
    past = tuple(data.draw(st.lists(st.integers(0, extra), min_size=1, max_size=3)))
    inputs = index_inputs(
        "float32", data.draw(st.sampled_from(("float32", "int8"))), S, S + extra, past, heads, width
    )
    check_selection(library, inputs, topk, data.draw(st.sampled_from(library.isas)))


def test_ties_threads_and_chunks(library):
    """CPU-14、CPU-3：并列取小的位置；线程数、分几块走都不影响选了谁，逐位相同。"""
    inputs = index_inputs("float32", "bfloat16", 2, 3000, (2990, 700))
    one, three = (select(library, inputs, 100, "", threads)["indices"] for threads in (1, 3))
    assert np.array_equal(one, three)
    tied = inputs | {"w": np.zeros_like(inputs["w"])}
    assert (select(library, tied, 100)["indices"] == np.arange(100)).all()
    int8 = index_inputs("float32", "int8", 2, 3000, (2990, 700))
    alike = [
        select(library, int8, 100, isa, threads)["indices"] for isa in library.isas for threads in (1, 3)
    ]
    assert np.array_equal(alike[0], alike[1])
    whole = index_inputs("float32", "float32", 300, 900, (550,))
    want = select(library, whole, 64)["indices"]
    part = {name: array[:, :170] if name in "qwk" else array.copy() for name, array in whole.items()}
    part = {name: np.ascontiguousarray(array) for name, array in part.items()}
    first = select(library, part, 64)
    rest = {name: np.ascontiguousarray(array[:, 170:]) for name, array in whole.items() if name in "qwk"}
    rest |= {"index_cache": first["index_cache_out"], "past_lens": np.array([720], np.int64)}
    second = select(library, rest, 64)
    assert np.array_equal(np.concatenate([first["indices"], second["indices"]], 1), want)


def test_nothing_to_rank_needs_no_queries(library):
    """CPU-14：看得见的都不超过名额时，没有 query 也选出同样的；有一行超过就拒绝。"""
    for cache_dtype in ("float32", "int8"):
        inputs = index_inputs("float32", cache_dtype, 4, 3000, (0, 20))
        without = inputs | {name: np.ascontiguousarray(inputs[name][:, :0]) for name in "qw"}
        want = select(library, inputs, 24)
        for name, got in select(library, without, 24).items():
            assert np.array_equal(got, want[name]), name
        without["past_lens"] = np.array([0, 21], np.int64)
        with pytest.raises(Exception, match="没有 query，而看得见的 key 超过 topk=24"):
            select(library, without, 24)


def check_attention(library: CpuLibrary, inputs: dict[str, np.ndarray], isa: str) -> None:
    """输出在容差之内，缓存逐位相同；没有选中的行填 NaN（int8 填任意字节），结果一位不变。"""
    kind = inputs["kv_cache"].dtype.name
    got = attend(library, inputs, isa)
    assert_attends_to_the_chosen(got, inputs, CpuLibrary(library.path, library.isas, isa).factors(kind))
    if (inputs["past_lens"] + inputs["q_nope"].shape[1]).max() <= inputs["indices"].shape[2]:
        return
    again = attend(library, unchosen_poisoned(inputs), isa, in_place=False)
    assert again[0].tobytes() == got[0].tobytes()


def assert_attends_to_the_chosen(
    got: Sequence[np.ndarray], inputs: dict[str, np.ndarray], rounded: str | None
) -> None:
    """``o`` 在容差之内，缓存逐位相同；``rounded`` 是乘数舍入成什么。"""
    want, written = sparse_mla_attention(*map(tensor, inputs.values()), SCALE, form="absorb")
    limit = TOLERANCES["op", coarser(inputs["q_nope"].dtype.name, rounded)]
    found = measure(got[0].astype(np.float32), want.float().numpy())
    assert limit.accepts(found), found
    assert np.array_equal(got[1].astype(np.float32), written.float().numpy())


def unchosen_poisoned(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """没有选中的行填 NaN，int8 填任意字节。"""
    changed = inputs | {"kv_cache": inputs["kv_cache"].copy()}
    kind, rng = changed["kv_cache"].dtype, np.random.default_rng(1)
    for b, past in enumerate(inputs["past_lens"]):
        unread = np.setdiff1d(np.arange(past), inputs["indices"][b])
        rows = changed["kv_cache"][b, 0]
        rows[unread] = np.nan if kind != np.int8 else rng.integers(-128, 128, rows[unread].shape)
    return changed


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_attends_to_the_chosen_rows(library, isa: str):
    """CPU-15：每种计算与缓存 dtype、各种形状与头数（一块放得下、放不下一个 token 的头）。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for dtype in COMPUTES:
        for cache_dtype in CACHES:
            for (S, T, past), H in zip(SHAPES, (4, 70, 130, 3, 5), strict=True):
                for widths in (ODD, WIDE):
                    inputs = attention_inputs(dtype, cache_dtype, S, T, past, H, 24, widths)
                    check_attention(library, inputs, isa)


def test_few_keys_are_dense(library):
    """CPU-15：长度不超过名额时与 MlaAttention 相同；结果与线程数无关。"""
    inputs = attention_inputs("float32", "float32", 9, 90, (3, 0), 4, 24, ODD)
    dense = [tensor(array) for name, array in inputs.items() if name not in ("indices", "counts")]
    want = mla_attention(*dense, SCALE)[0].numpy()
    assert TOLERANCES["op", "float32"].accepts(measure(attend(library, inputs)[0], want))
    long = attention_inputs("float32", "bfloat16", 2, 3000, (2990, 700), 70, 500, WIDE)
    one, three = (attend(library, long, "", threads)[0] for threads in (1, 3))
    assert one.tobytes() == three.tobytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("indices", lambda a: np.full_like(a, 90), "不在缓存的 90 行里"),
        ("indices", lambda a: np.full_like(a, -1), "不在缓存的 90 行里"),
        ("counts", lambda a: np.zeros_like(a), "应在 1 到 24 之间"),
        ("counts", lambda a: np.full_like(a, 25), "应在 1 到 24 之间"),
        ("counts", lambda a: a[:, :1], "应为 [2, 3]"),
        ("past_lens", lambda a: a + 100, "放不进容量"),
    ],
)
def test_bad_selections_are_refused(library, name: str, change, message: str):
    """CPU-4：选中的位置越界、个数不对的，拒绝而不是去读那块内存。"""
    inputs = attention_inputs("float32", "float32", 3, 90, (60, 80), 4, 24, ODD)
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    with pytest.raises(Exception, match=re.escape(message)):
        attend(library, inputs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w", lambda a: a[:, :, :2], "w 是 [1, 2, 2]，应为 [1, 2, 33]"),
        ("k", lambda a: a[:, :, :2], "k 是 [1, 2, 2]，应为 [1, 2, 20]"),
        ("index_cache", lambda a: a[:, :, :, :2], "index_cache 是"),
        ("past_lens", lambda a: a - 50, "放不进容量"),
    ],
)
def test_bad_index_inputs_are_refused(library, name: str, change, message: str):
    """CPU-4：索引器的形状不符、放不下的，拒绝。"""
    inputs = index_inputs("float32", "float32", 2, 40, (30,))
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    with pytest.raises(Exception, match=re.escape(message)):
        select(library, inputs, 24)
