"""只量化权重：分块的码与 scale、配方逐块物化、两个 pass 的匹配、拒绝、保留、幂等与数值。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from safetensors.numpy import save_file

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.checkpoint.recipe import (
    Recipe,
    load_array,
    materialize,
    quantized_recipes,
)
from deepseek_export.checkpoint.restored import quantization_error
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    Quantization,
    block_codes,
    block_scales,
    dequantized,
    packed_int4,
    unpacked_int4,
)
from deepseek_export.dtypes import DTYPES
from tests.models import ort_session

pytestmark = pytest.mark.unit

SCALES = ("float32", "float16", "bfloat16")
FORMS = [BlockFormat(kind=kind, block=block) for kind in ("int8", "int4") for block in (32, 64, 128)]


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS), rows=st.integers(1, 3), width=st.integers(1, 200), seed=st.integers(0, 999)
)
def test_rounding_is_half_a_step_or_clipped(form, rows, width, seed):
    """还原的值与原值至多差半个 scale，只有截断到最大、最小的码的例外；形状不变，不满一块的也对。"""
    weights = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    got, scales = dequantized(weights, form), block_scales(weights, form)
    assert (got.shape, scales.shape) == (weights.shape, (rows, -(-width // form.block)))
    step = np.repeat(scales, form.block, axis=-1)[:, :width]
    clipped = (got >= step * (form.zero - 1.001)) | (got <= -step * (form.zero - 0.001))
    assert (clipped | (np.abs(got - weights) <= step * 0.5001)).all()
    assert block_codes(weights, form).shape == (*scales.shape, form.block * form.bits // 8)


@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(FORMS), scale=st.sampled_from(SCALES), seed=st.integers(0, 999))
def test_scales_beat_the_largest_value(form, scale, seed):
    """EXPORT-32：逐块的平方误差不大于「最大的绝对值除以最大的码」那个 scale 的；int4 平均小得多。"""
    form = form.model_copy(update={"scale": scale})
    weights = np.random.default_rng(seed).standard_normal((8, 4, form.block)).astype(np.float32)
    plain = np.abs(weights).max(-1, keepdims=True) / np.float32(form.zero - 1)
    plain = plain.astype(DTYPES[scale].numpy).astype(np.float32)
    codes = np.clip(np.rint(weights / plain), -form.zero, form.zero - 1)
    want = np.square(codes * plain - weights).sum(-1)
    got = np.square(dequantized(weights, form) - weights).sum(-1)
    assert block_scales(weights, form).dtype == DTYPES[scale].numpy
    assert (got <= want * 1.0001).all()
    assert got.sum() < (0.95 if form.bits == 4 else 1.0001) * want.sum()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zero_block_and_extremes(form):
    """全零的块 scale 是 0、还原成 0；块里绝对值最大的正好还原成自己。"""
    weights = np.zeros((2, 2 * form.block), np.float32)
    weights[1, form.block] = -3.5
    assert np.array_equal(dequantized(weights, form), weights)
    assert np.array_equal(block_scales(weights, form) > 0, [[False, False], [False, True]])


def test_int4_packs_the_first_code_low():
    """int4 两个码一字节，低位在前，零点 8。"""
    weights = np.zeros((1, 32), np.float32)
    weights[0, :3] = 7.0, -7.0, 1.0
    codes = block_codes(weights, BlockFormat(kind="int4", block=32))
    assert codes[0, 0, :3].tolist() == [15 | (1 << 4), 9 | (8 << 4), 8 | (8 << 4)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_signed_codes_restore_the_same_weights(tmp_path: Path, form, dtype):
    """EXPORT-33：有符号的码与无符号的还原出同样的值，逐位相同；DequantizeLinear 算出的也是。"""
    weights = np.random.default_rng(0).standard_normal((3, 4, 256)).astype(dtype)
    save_file({"w": weights.reshape(12, 256)}, tmp_path / "model.safetensors")
    store, form = TensorStore.open(tmp_path), form.model_copy(update={"scale": dtype})
    recipe = Recipe(op="copy", sources=("w",), shape=(12, 256), dtype=dtype)
    codes, scales = quantized_recipes(recipe, form, signed=True)
    assert (codes.shape, codes.dtype) == ((12, 256), form.kind)
    assert codes.nbytes == 12 * 256 * form.bits // 8
    arrays = {"codes": load_array("w", codes, store), "scales": load_array("w", scales, store)}
    want = dequantized(weights.reshape(12, 256), form)
    steps = np.repeat(arrays["scales"].astype(np.float32), form.block, axis=-1)
    assert np.array_equal((arrays["codes"].astype(np.float32) * steps).astype(dtype), want)
    node = helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1, block_size=form.block)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    infos = [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in arrays.items()]
    out = helper.make_tensor_value_info("w", kinds["scales"], want.shape)
    graph = helper.make_graph([node], "g", infos, [out])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    feeds = {name: ort_value(array) for name, array in arrays.items()}
    (got,) = ort_session(proto).run_with_ort_values(["w"], feeds)
    assert np.array_equal(got.numpy(), want)


def test_int4_packing_is_its_own_inverse():
    values = np.arange(-8, 8).astype(DTYPES["int4"].numpy)
    assert packed_int4(values).tolist()[:2] == [0x98, 0xBA]
    assert np.array_equal(unpacked_int4(packed_int4(values)), values)


@pytest.mark.parametrize(
    ("keep", "path", "kept"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head", "head.lm_head", True),
        ("o_proj", "model.layers.3.self_attn.o_proj.weight", True),
        ("layers.3", "model.layers.3.mlp.up_proj.weight", True),
        ("layers.3", "model.layers.33.mlp.up_proj.weight", False),
        ("proj", "model.layers.3.self_attn.o_proj.weight", False),
        ("mlp.experts", "model.layers.3.mlp.experts.*.up_proj.weight", True),
    ],
)
def test_keep_matches_whole_segments(keep, path, kept):
    quantization = Quantization(kind="int8", keep=(keep,))
    assert quantization.keeps(path) == kept
    assert quantization.unmatched([path]) == ([] if kept else [keep])


@pytest.mark.parametrize("op", ["copy", "stack", "stack_swiglu"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[4]], ids=str)
def test_recipes_stream_the_same_codes(tmp_path: Path, op, form):
    """EXPORT-32：codes、scales 逐块物化，与整个权重一次量化相同；误差也由数据流算出。"""
    rng, names = np.random.default_rng(0), ["g0", "u0", "g1", "u1"]
    arrays = {name: rng.standard_normal((5, 70)).astype(np.float32) for name in names}
    save_file(arrays, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    shape = {"copy": (5, 70), "stack": (4, 5, 70), "stack_swiglu": (2, 10, 70)}[op]
    sources = names[:1] if op == "copy" else names
    recipe = Recipe.model_validate({"op": op, "sources": sources, "shape": shape, "dtype": "float32"})
    weights = load_array("w", recipe, store)
    codes, scales = quantized_recipes(recipe, form)
    assert np.array_equal(load_array("w", codes, store), block_codes(weights, form))
    assert np.array_equal(load_array("w", scales, store), block_scales(weights, form))
    chunks = list(materialize("w", codes, store, chunk_bytes=2 * 70 * 4))
    assert len(chunks) > len(sources)
    assert sum(chunk.nbytes for chunk in chunks) == codes.nbytes
    assert Recipe.model_validate(codes.model_dump(mode="json")) == codes
    error = quantization_error("w", codes, store)
    gap = dequantized(weights, form) - weights
    assert error.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(weights))
    assert error.max_abs == pytest.approx(np.abs(gap).max())
