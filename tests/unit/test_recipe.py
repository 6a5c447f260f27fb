"""checkpoint/recipe.py：配方覆盖每个张量恰好一次，逐块物化的内容、dtype 与报错。"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from deepseek_export.checkpoint import expected_tensors
from deepseek_export.checkpoint.recipe import (
    Recipe,
    load_array,
    materialize,
    quantized_recipes,
    weight_recipes,
)
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.reference import Forms, ReferenceModel, initializer_name
from tests.models import VARIANTS, model_config

pytestmark = pytest.mark.unit

BF16 = np.dtype(ml_dtypes.bfloat16)


def store_of(directory: Path, **arrays: np.ndarray) -> TensorStore:
    save_file(arrays, directory / "model.safetensors")
    return TensorStore.open(directory)


def recipe(op: str, *sources: str, shape: tuple[int, ...], dtype: str = "float32") -> Recipe:
    return Recipe.model_validate({"op": op, "sources": sources, "shape": shape, "dtype": dtype})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_used_exactly_once(variant):
    """来源合起来就是检查点应有的全部张量；initializer 恰好是参考模型的全部参数，形状相同。"""
    config = model_config(variant)
    recipes = weight_recipes(config, "float16")
    used = Counter(source for r in recipes.values() for source in r.sources)
    assert used == Counter(expected_tensors(config).keys())
    with torch.device("meta"):
        model = ReferenceModel(config, Forms("auto", "sparse", as_ops=True))
    shapes = {initializer_name(name, config): tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: r.shape for name, r in recipes.items()}
    kept = {name for name, r in recipes.items() if r.dtype == "float32"}
    router = {n for n in recipes if n.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))}
    # 索引器各头的权重也不降精度：它决定选谁。
    assert kept == router | {name for name in recipes if name.endswith("indexer.weights_proj.weight")}
    assert len(router) == 2 * config.num_moe_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_router_bias(variant):
    """V3 从检查点读 bias，V2、A.X-K1 用零；每个 MoE 层恰好一个。"""
    config = model_config(variant)
    recipes = weight_recipes(config, "float32")
    ops = [r.op for name, r in recipes.items() if name.endswith("e_score_correction_bias")]
    stored = config.topk_method == "noaux_tc" and config.family != "axk1"
    assert ops == ["copy" if stored else "zeros"] * config.num_moe_layers


@pytest.mark.parametrize("variant", ["v3-bias-tied", "v2-bias-tied"])
def test_tied_head_has_no_recipe(variant):
    """权重绑定时没有 lm_head，输出头就是词嵌入那个 initializer。"""
    config = model_config(variant)
    assert "lm_head.weight" not in weight_recipes(config, "float32")
    assert initializer_name("head.lm_head.weight", config) == "model.embed_tokens.weight"
    assert "lm_head.weight" in weight_recipes(model_config("v3"), "float32")


def test_stacked_experts_are_in_numeric_order():
    """叠放次序按专家编号（10 在 9 之后，不是字典序）。"""
    recipes = weight_recipes(model_config("v3"), "float32")
    stack = recipes["model.layers.1.mlp.experts.*.down_proj.weight"]
    assert (stack.op, stack.shape) == ("stack", (12, 48, 28))
    assert stack.sources == tuple(f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(12))
    assert stack.nbytes == 12 * 48 * 28 * 4


def test_initializer_name_refuses_unknown():
    """没有对应关系的参数名报错，而不是原样放行。"""
    with pytest.raises(KeyError):
        initializer_name("mtp.0.weight", model_config("v3"))


@pytest.mark.parametrize("variant", ["v3", "v2-lite"])
def test_recipes_survive_json_and_fold_the_experts(variant):
    """写成 JSON 时编号连续的专家折成一个名字，读回来一个不差；折不了的原样。"""
    for r in weight_recipes(model_config(variant), "float32").values():
        text = r.model_dump_json()
        assert Recipe.model_validate_json(text) == r
        assert text.count("proj.weight") <= 1
    prefix = "model.layers.1.mlp.experts"
    pairs = [f"{prefix}.{e}.{p}_proj.weight" for e in range(8, 12) for p in ("gate", "up")]
    folded = recipe("stack_swiglu", *pairs, shape=(4, 2, 1)).model_dump(mode="json")
    assert folded["sources"] == [f"{prefix}.{{8..11}}.{{gate_proj,up_proj}}.weight"]
    assert Recipe.model_validate(folded).sources == tuple(pairs)
    for odd in (pairs[::-1], pairs[:3], [*pairs, "x"], ["a.{0..3}"]):
        dumped = recipe("stack", *odd, shape=(1,)).model_dump(mode="json")
        assert dumped["sources"] == odd
        assert Recipe.model_validate(dumped).sources == tuple(odd)
    with pytest.raises(ValueError, match="太长"):
        recipe("stack", f"{prefix}.{{0..99999999}}.up_proj.weight", shape=(1,))


def test_stack_layout(tmp_path: Path):
    """stack：第 0 维是来源的次序。"""
    arrays = {
        name: np.random.default_rng(i).standard_normal((3, 5)).astype(np.float32)
        for i, name in enumerate("cab")
    }
    r = recipe("stack", "b", "a", "c", shape=(3, 3, 5))
    got = load_array("w", r, store_of(tmp_path, **arrays))
    assert np.array_equal(got, np.stack([arrays["b"], arrays["a"], arrays["c"]]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stack_swiglu_layout(tmp_path: Path, dtype):
    """stack_swiglu：每个专家内第 2i 行是 gate 的第 i 行，第 2i+1 行是 up 的第 i 行。"""
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}{e}": rng.standard_normal((3, 5)).astype(np.float32) for e in range(2) for kind in ("g", "u")
    }
    r = recipe("stack_swiglu", "g0", "u0", "g1", "u1", shape=(2, 6, 5), dtype=dtype)
    got = load_array("w", r, store_of(tmp_path, **arrays))
    assert got.dtype == DTYPES[dtype].numpy
    for e in range(2):
        for i in range(3):
            assert np.array_equal(got[e, 2 * i], arrays[f"g{e}"][i].astype(got.dtype))
            assert np.array_equal(got[e, 2 * i + 1], arrays[f"u{e}"][i].astype(got.dtype))


def test_zeros(tmp_path: Path):
    """zeros 不读任何张量。"""
    got = load_array("b", recipe("zeros", shape=(7,)), store_of(tmp_path, x=np.ones(1, np.float32)))
    assert (got.dtype, got.shape, got.any()) == (np.float32, (7,), False)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 3 * 14, 1 << 20])
def test_deinterleave(tmp_path: Path, chunk_bytes):
    """每组最后几行由成对改成前后两半；一块总是若干整组。"""
    array = np.arange(21 * 3, dtype=np.float32).reshape(21, 3)
    r = recipe("deinterleave", "x", shape=(21, 3)).model_copy(update={"groups": (7, 4)})
    assert Recipe.model_validate_json(r.model_dump_json()) == r
    chunks = list(materialize("w", r, store_of(tmp_path, x=array), chunk_bytes))
    assert all(len(chunk) % 7 == 0 for chunk in chunks)
    order = [head + row for head in (0, 7, 14) for row in (0, 1, 2, 3, 5, 4, 6)]
    np.testing.assert_array_equal(np.concatenate(chunks), array[order])


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [np.dtype(np.float32), np.dtype(np.float16), BF16])
def test_casts(tmp_path: Path, source, target):
    """dtype 转换就是 numpy 的就近舍入；拓宽无损。"""
    array = np.random.default_rng(1).standard_normal((64, 9)).astype(source)
    got = load_array("w", recipe("copy", "x", shape=(64, 9), dtype=target), store_of(tmp_path, x=array))
    assert np.array_equal(got, array.astype(DTYPES[target].numpy))


def test_bfloat16_to_float32_is_exact(tmp_path: Path):
    """全部 65536 个 bfloat16 位型里，有限的都无损变成 float32（含次正规数与负零）。"""
    array = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    array = array[(array.view(np.uint16) & 0x7F80) != 0x7F80]
    got = load_array("w", recipe("copy", "x", shape=array.shape), store_of(tmp_path, x=array))
    bits = array.view(np.uint16).astype(np.uint32) << 16
    assert np.array_equal(got.view(np.uint32), bits)


@pytest.mark.parametrize("op", ["copy", "stack", "stack_swiglu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", [np.dtype(np.float32), BF16])
def test_nan_and_inf_are_refused(tmp_path: Path, op, value, source):
    """来源有 NaN / Inf：DSX-E115，点名张量、坐标与 initializer。"""
    good, bad = np.ones((2, 3), source), np.ones((2, 3), source)
    bad[1, 2] = value
    shape = {"copy": (2, 3), "stack": (2, 2, 3), "stack_swiglu": (1, 4, 3)}[op]
    r = recipe(op, *(["bad"] if op == "copy" else ["good", "bad"]), shape=shape)
    with pytest.raises(DsxError) as error:
        load_array("the.initializer", r, store_of(tmp_path, good=good, bad=bad))
    assert error.value.code == "DSX-E115"
    assert "bad[1, 2]" in error.value.what
    assert "the.initializer" in error.value.what


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        (np.dtype(np.float32), "float16", 70000.0),
        (BF16, "float16", -70000.0),
        (np.dtype(np.float32), "bfloat16", float(np.finfo(np.float32).max)),
    ],
)
def test_overflow_is_refused(tmp_path: Path, source, target, value):
    """转成更窄的范围时溢出：DSX-E116，点名张量与坐标。"""
    array = np.ones((3, 4), source)
    array[2, 1] = value
    with pytest.raises(DsxError) as error:
        load_array("w", recipe("copy", "x", shape=(3, 4), dtype=target), store_of(tmp_path, x=array))
    assert error.value.code == "DSX-E116"
    assert "x[2, 1]" in error.value.what


@pytest.mark.parametrize(("kind", "codes"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("part", [0, 1])
def test_a_scale_that_does_not_fit_is_refused(tmp_path: Path, kind, codes, part):
    """EXPORT-32：一块的 scale 超出 float16：DSX-E116，点名权重，说得出至多多大；刚好装得下的照常。"""
    array = np.ones((2, 64), np.float32)
    form = BlockFormat(kind=kind, scale="float16")
    quantised = quantized_recipes(recipe("copy", "x", shape=(2, 64)), form)[part]
    array[1, 3] = 65504 * codes
    assert np.isfinite(load_array("w", quantised, store_of(tmp_path, x=array)).astype(np.float32)).all()
    array[1, 3] = -65504 * codes * 1.01
    with pytest.raises(DsxError) as error:
        load_array("w", quantised, store_of(tmp_path, x=array))
    assert error.value.code == "DSX-E116"
    assert "w 有绝对值" in error.value.what
    assert "float16" in error.value.what


def test_largest_float16_fits(tmp_path: Path):
    """65504 与会被舍入到它的值不算溢出。"""
    array = np.array([65504.0, -65519.0], np.float32)
    got = load_array("w", recipe("copy", "x", shape=(2,), dtype="float16"), store_of(tmp_path, x=array))
    assert got.tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("variant", ["v3", "v2-lite"])
def test_chunks_are_at_most_one_source(saved, variant):
    """逐块产出：每块不大于一个来源张量，连续，拼起来就是整个 initializer。"""
    checkpoint = saved(variant)[1]
    for name, r in weight_recipes(checkpoint.config, "float32").items():
        chunks = list(materialize(name, r, checkpoint.store))
        assert len(chunks) == max(len(r.sources), 1)
        for chunk, source in zip(chunks, r.sources, strict=False):
            assert chunk.size == np.prod(checkpoint.store[source].shape)
        assert all(chunk.flags.c_contiguous and chunk.dtype == DTYPES[r.dtype].numpy for chunk in chunks)
        assert sum(chunk.nbytes for chunk in chunks) == r.nbytes
        joined = np.concatenate([chunk.reshape(-1) for chunk in chunks]).reshape(r.shape)
        assert np.array_equal(joined, load_array(name, r, checkpoint.store))


def test_materialize_is_lazy(tmp_path: Path):
    """后面的来源坏了，前面的块照样先产出：一次只读一个来源。"""
    store = store_of(tmp_path, a=np.ones(3, np.float32), b=np.full(3, np.nan, np.float32))
    blocks = materialize("w", recipe("stack", "a", "b", shape=(2, 3)), store)
    assert next(blocks).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(DsxError):
        next(blocks)
