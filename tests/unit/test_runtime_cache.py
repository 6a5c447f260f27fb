"""缓存：规格推导、档位、升档、原地更新。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deepseek_export.backend.capacity import bucket_capacity
from deepseek_export.backend.contract import CacheSpec, CacheTensor
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.backend.ort.values import port_of
from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession
from tests.unit.test_runtime_toy import LATENT, LAYERS, VOCAB, Toy, make_toy, save_toy

pytestmark = pytest.mark.unit

ONE = np.array([[0]])


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy()


@pytest.fixture(scope="module")
def session(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    path = save_toy(toy, tmp_path_factory.mktemp("toy") / "model.onnx")
    return ModelSession(OrtRunner(path, threads=1, max_positions=toy.max_positions))


def spec_of(raw: ort.InferenceSession) -> CacheSpec:
    return CacheSpec.of(map(port_of, raw.get_inputs()), map(port_of, raw.get_outputs()))


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_bucket_fits_and_is_a_step(needed: int, limit: int) -> None:
    if needed > limit:
        with pytest.raises(DsxError, match="DSX-E506"):
            bucket_capacity(needed, limit)
        return
    capacity = bucket_capacity(needed, limit)
    assert needed <= capacity <= limit
    assert capacity == limit or (capacity % 256 == 0 and (capacity // 256).bit_count() == 1)
    assert capacity == 256 or capacity == limit or capacity < 2 * needed


def test_spec_comes_from_the_session(session: ModelSession) -> None:
    names = [(t.name, t.out_name) for t in session.runner.contract.caches.tensors]
    assert names == [(f"kv_cache.{i}", f"kv_cache_out.{i}") for i in range(LAYERS)]
    assert session.runner.contract.caches.bytes_per_token == LAYERS * LATENT * 4
    caches = session.new_caches(3)
    assert caches.capacity == 256
    assert caches.nbytes == 3 * 256 * session.runner.contract.caches.bytes_per_token


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_growth_keeps_rows_and_zeroes_the_rest(dtype: type) -> None:
    spec = CacheSpec((CacheTensor("kv_cache.0", "kv_cache_out.0", "latent", 0, np.dtype(dtype), 2, 3),))
    caches = OrtCaches.allocate(spec, 2, max_positions=700)
    assert not caches.array("kv_cache.0").any()
    caches.array("kv_cache.0")[...] = 3
    assert not caches.ensure(256)
    assert caches.version == 0
    assert caches.ensure(257)
    assert (caches.capacity, caches.version) == (512, 1)
    grown = caches.array("kv_cache.0")
    assert (grown[:, :, :256] == 3).all()
    assert not grown[:, :, 256:].any()
    assert caches.value("kv_cache.0").data_ptr() == grown.ctypes.data
    assert caches.ensure(600)
    assert caches.capacity == 700
    with pytest.raises(DsxError, match="701") as caught:
        caches.ensure(701)
    assert caught.value.code == "DSX-E506"
    assert caches.capacity == 700


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_update_is_in_place(toy: Toy, tmp_path: Path, dtype: str) -> None:
    path = save_toy(toy, tmp_path / "model.onnx", cache_dtype=dtype)
    raw = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    caches = OrtCaches.allocate(spec_of(raw), 1, toy.max_positions)
    before = {t.name: caches.array(t.name).ctypes.data for t in caches.spec.tensors}
    binding = raw.io_binding()
    caches.bind(binding)
    feeds = {"input_ids": [[5]], "past_lens": [7], "logits_positions": [[0]]}
    for name, value in feeds.items():
        binding.bind_cpu_input(name, np.array(value, np.int64))
    binding.bind_output("logits")
    raw.run_with_iobinding(binding)
    names = [tensor.out_name for tensor in caches.spec.tensors] + ["logits"]  # 按绑定的先后
    outputs = dict(zip(names, binding.get_outputs(), strict=True))
    for tensor in caches.spec.tensors:
        assert outputs[tensor.out_name].data_ptr() == before[tensor.name]
        assert np.flatnonzero(caches.array(tensor.name)[0, 0].any(axis=-1)).tolist() == [7]


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_cost_does_not_grow_with_capacity(dtype: int) -> None:
    """清零的大缓存还没有真正占物理页：原地更新只碰新行所在的页，复制则会让整块驻留。"""
    info = helper.make_tensor_value_info
    node = helper.make_node("TensorScatter", ["kv_cache.0", "u", "at"], ["kv_cache_out.0"], axis=-2)
    shape: list[Any] = ["B", 1, "T", 256]
    inputs = [info("kv_cache.0", dtype, shape), info("u", dtype, ["B", 1, "S", 256])]
    inputs.append(info("at", TensorProto.INT64, ["B"]))
    graph = helper.make_graph([node], "g", inputs, [info("kv_cache_out.0", dtype, shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    raw = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    spec = spec_of(raw)
    caches, other = (OrtCaches.allocate(spec, 1, 131_072, needed=131_072) for _ in range(2))
    binding = raw.io_binding()
    caches.bind(binding)
    new = OrtCaches.allocate(spec, 1, 1)
    new.array("kv_cache.0")[...] = 1
    binding.bind_ortvalue_input("u", new.value("kv_cache.0"))
    binding.bind_cpu_input("at", np.array([100_000]))

    def growth() -> int:
        before = psutil.Process().memory_info().rss
        raw.run_with_iobinding(binding)
        return psutil.Process().memory_info().rss - before

    assert growth() < caches.nbytes // 8
    assert caches.array("kv_cache.0")[0, 0, 100_000].all()
    # 对照：输出换成另一块内存就会整块复制，说明上面的量法看得见复制。
    binding.bind_ortvalue_output("kv_cache_out.0", other.value("kv_cache.0"))
    assert growth() > caches.nbytes // 2


def test_update_writes_only_the_new_rows(session: ModelSession) -> None:
    """不复制的证据：在新行以外的地方埋入标记，跑完之后标记与地址都不变。"""
    caches = session.new_caches(2)
    address = caches.array("kv_cache.0").ctypes.data
    caches.array("kv_cache.0")[:, :, 50:] = 9.0
    session.run(np.array([[1, 2], [3, 4]]), np.array([0, 10]), np.array([[1], [1]]), caches)
    kept = caches.array("kv_cache.0")
    assert kept.ctypes.data == address == caches.value("kv_cache.0").data_ptr()
    assert (kept[:, :, 50:] == 9.0).all()
    assert np.flatnonzero(kept[1, 0, :50].any(axis=-1)).tolist() == [10, 11]


def test_growth_in_mid_sequence_changes_nothing(toy: Toy, session: ModelSession) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 260)
    caches = session.new_caches(1)
    session.run(ids[None, :255], np.array([0]), ONE, caches)
    got = []
    for position in range(255, 260):
        caches.ensure(position + 1)
        logits = session.run(ids[None, position : position + 1], np.array([position]), ONE, caches)
        got.append(logits[0, 0].copy())
    assert caches.capacity == 512
    assert np.stack(got) == pytest.approx(toy.forward(ids.tolist())[255:], abs=1e-4)
