"""缓存的约定（RUNTIME-7）：视图、复制、清零、存取一行；两个后端同一套测试，TensorRT 的显存是替身的。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_export.backend.base import Caches
from deepseek_export.backend.contract import CACHE_KINDS, CacheSpec, GraphContract, Port, shape_of
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.tensorrt.caches import DeviceCaches
from deepseek_export.backend.tensorrt.cuda import Cuda
from deepseek_export.errors import DsxError
from tests.fake_gpu import FakeGpu

pytestmark = pytest.mark.contract

CAPACITY = 256


def ports(stems: tuple[str, ...]) -> tuple[list[Port], list[Port]]:
    """一层里有 ``stems`` 这几种缓存的两层图。"""
    inputs = [Port("input_ids", "int64", ("B", "S")), Port("past_lens", "int64", ("B",))]
    inputs.append(Port("logits_positions", "int64", ("B", "L")))
    outputs = [Port("logits", "float32", ("B", "L", 11))]
    for layer in range(2):
        for width, stem in enumerate(stems, 3):
            dims = ("B", 2, "T", width)
            inputs.append(Port(f"{stem}.{layer}", "float16", dims))
            outputs.append(Port(f"{stem}_out.{layer}", "float16", dims))
    return inputs, outputs


SPEC = CacheSpec.of(*ports(("k_cache", "v_cache")))


@pytest.fixture(scope="module", params=["ort", "trt"])
def allocate(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Caches]]:
    if request.param == "ort":
        yield lambda batch: OrtCaches.allocate(SPEC, batch, CAPACITY)
        return
    with pytest.MonkeyPatch.context() as patch:
        FakeGpu(patch)
        cuda = Cuda()
        yield lambda batch: DeviceCaches.allocate(cuda, SPEC, batch, CAPACITY, 1)


def filled(caches: Caches, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """每行写满不同的数；返回各行的内容。"""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(caches.batch):
        content = {
            t.name: rng.standard_normal((t.heads, CAPACITY, t.width)).astype(t.dtype)
            for t in caches.spec.tensors
        }
        caches.restore_row(row, content)
        rows.append(content)
    return rows


def assert_row(caches: Caches, row: int, want: dict[str, np.ndarray]) -> None:
    got = caches.save_row(row, CAPACITY)
    assert got.keys() == want.keys()
    for name in want:
        assert np.array_equal(got[name], want[name]), name


def test_saving_and_restoring_a_row_is_exact(allocate):
    """RUNTIME-7：一行存到主机再写回别处，逐位相同，别的行不动；只写存下的那么长。"""
    caches = allocate(3)
    rows = filled(caches)
    part = caches.save_row(1, 7)
    assert {name: array.shape[1] for name, array in part.items()} == dict.fromkeys(part, 7)
    caches.restore_row(2, part)
    assert_row(caches, 0, rows[0])
    assert_row(caches, 1, rows[1])
    expected = {n: np.concatenate([rows[1][n][:, :7], rows[2][n][:, 7:]], axis=1) for n in rows[2]}
    assert_row(caches, 2, expected)


@settings(max_examples=25, deadline=None)
@given(source=st.integers(0, 3), target=st.integers(0, 3), length=st.integers(0, CAPACITY))
def test_copying_a_row_equals_saving_and_restoring(allocate, source, target, length):
    """RUNTIME-7：复制到同一个缓存、到另一个缓存，都等于存下再写回。"""
    caches, other = allocate(4), allocate(4)
    rows, theirs = filled(caches), filled(other, 1)
    caches.copy_row(source, target, length)
    other.copy_row(source, target, length, caches)
    for have, kept in ((caches, rows), (other, theirs)):
        want = {
            n: np.concatenate([rows[source][n][:, :length], a[:, length:]], 1)
            for n, a in kept[target].items()
        }
        assert_row(have, target, want)
        for row in {0, 1, 2, 3} - {target}:
            assert_row(have, row, kept[row])


def test_first_rows_are_a_view(allocate):
    """RUNTIME-7：前几行的视图与主人是同一块内存，同样的行数得到同一个对象；越界是调用方的缺陷。"""
    caches = allocate(3)
    rows = filled(caches)
    view = caches.first(2)
    assert view is caches.first(2)
    assert caches.first(3) is caches
    assert (view.batch, view.capacity, view.nbytes * 3) == (2, CAPACITY, caches.nbytes * 2)
    assert_row(view, 1, rows[1])
    view.copy_row(0, 1, CAPACITY)
    assert_row(caches, 1, rows[0])
    assert_row(caches, 2, rows[2])
    for bad in (0, 4):
        with pytest.raises(ValueError, match="3 行"):
            caches.first(bad)


def test_rows_in_the_middle_are_a_view(allocate):
    """RUNTIME-7：中间连着的几行也是视图，行号从 0 数；写它只动那几行，视图的视图一样。"""
    caches = allocate(4)
    rows = filled(caches)
    view = caches.rows(1, 2)
    assert view is caches.rows(1, 2)
    assert (view.batch, view.capacity) == (2, CAPACITY)
    assert_row(view, 1, rows[2])
    view.copy_row(0, 1, CAPACITY)
    last = caches.rows(1, 3).rows(2, 1)
    last.copy_row(0, 0, CAPACITY, view)
    for row, want in enumerate((rows[0], rows[1], rows[1], rows[1])):
        assert_row(caches, row, want)
    for start, count in ((-1, 2), (3, 2), (0, 0)):
        with pytest.raises(ValueError, match="4 行"):
            caches.rows(start, count)


def test_rows_out_of_line_are_refused():
    """RUNTIME-7：TensorRT 要对齐的地址；一行的字节数不合就说清怎么重建，前几行不受影响。"""
    with pytest.MonkeyPatch.context() as patch:
        FakeGpu(patch)
        caches = DeviceCaches.allocate(Cuda(), SPEC, 2, 31, 1)
        assert caches.first(1).batch == 1
        with pytest.raises(DsxError, match="DSX-E919"):
            caches.rows(1, 1)


def test_device_caches_work_in_every_thread():
    """RUNTIME-7：CUDA 的当前上下文逐线程，换一个线程也能用、能归还。"""
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeGpu(patch)
        cuda = Cuda()
        with ThreadPoolExecutor(1) as pool:
            caches = pool.submit(DeviceCaches.allocate, cuda, SPEC, 2, CAPACITY, 1).result()
            rows = pool.submit(filled, caches).result()
        assert_row(caches, 1, rows[1])
        with ThreadPoolExecutor(1) as pool:
            pool.submit(caches.copy_row, 1, 0, CAPACITY).result()
        assert_row(caches, 0, rows[1])
        del caches
        assert not gpu.driver.live


def test_clearing_a_row(allocate):
    """RUNTIME-7：清零只动那一行。"""
    caches = allocate(2)
    rows = filled(caches)
    caches.clear_row(0)
    assert_row(caches, 0, {name: np.zeros_like(array) for name, array in rows[0].items()})
    assert_row(caches, 1, rows[1])


def test_too_long_is_refused(allocate):
    """RUNTIME-4：放不下的长度按码拒绝，缓存不动。"""
    caches = allocate(1)
    assert not caches.ensure(CAPACITY)
    with pytest.raises(DsxError, match="DSX-E506"):
        caches.ensure(CAPACITY + 1)
    assert caches.capacity == CAPACITY


def test_views_follow_growth():
    """RUNTIME-7：主人升档之后，视图看到的是新内存；视图升档，主人也一样。"""
    caches = OrtCaches.allocate(SPEC, 2, 4 * CAPACITY)
    rows, view = filled(caches), caches.first(1)
    assert caches.ensure(CAPACITY + 1)
    assert view.capacity == 2 * CAPACITY
    assert_row(view, 0, rows[0])
    assert view.ensure(2 * CAPACITY + 1)
    assert caches.capacity == 4 * CAPACITY
    assert_row(caches, 1, rows[1])
    assert view.value("k_cache.0").data_ptr() == caches.array("k_cache.0").ctypes.data


@pytest.mark.parametrize("stem", sorted(CACHE_KINDS))
def test_kinds_and_layers_come_from_the_names(stem):
    """RUNTIME-7：一种缓存是表里的一行；名字给出种类与层号。"""
    spec = CacheSpec.of(*ports((stem,)))
    assert [(t.kind, t.layer, t.out_name) for t in spec.tensors] == [
        (CACHE_KINDS[stem], layer, f"{stem}_out.{layer}") for layer in range(2)
    ]


def test_shapes_of_a_call_come_from_named_dims():
    """RUNTIME-7：一次调用里各端口的形状由具名维度得出。"""
    contract = GraphContract.of(*ports(("kv_cache",)))
    sizes = contract.sizes(
        {
            "input_ids": np.zeros((2, 5)),
            "logits_positions": np.zeros((2, 3)),
            "draft_ids": np.zeros((2, 2)),
        }
    )
    assert shape_of("logits", sizes) == (2, 3, 11)
    assert shape_of("uniform", sizes) == (2, 3)
    assert shape_of("past_lens", sizes) == (2,)
