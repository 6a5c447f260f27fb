"""FP8 分块检查点：反量化逐元素精确、边上的块不满也对，缺 scale、多 scale、混放一律拒绝。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_export.checkpoint import Checkpoint, expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.recipe import (
    Recipe,
    load_array,
    materialize,
    mtp_recipes,
    weight_recipes,
)
from deepseek_export.checkpoint.synthetic import quantize_fp8, write_checkpoint
from deepseek_export.errors import DsxError
from tests.models import fp8_twins
from tests.unit.test_checkpoint import TINY

pytestmark = pytest.mark.unit

#: 小到 TINY 的每个矩阵都跨好几块，而且大多除不尽。
BLOCK = (12, 20)
FP8 = TINY | {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
}
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """FP8 检查点，带 MTP 层；只读。"""
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), FP8, mtp=True)


def changed(fp8: Path, out: Path, drop: tuple[str, ...] = (), **tensors: torch.Tensor) -> Path:
    """改几个张量的副本；名字里的点写成 ``__``。"""
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    arrays = load_file(fp8 / "model.safetensors") | renamed
    save_file({name: value for name, value in arrays.items() if name not in drop}, out / "model.safetensors")
    (out / "config.json").write_bytes((fp8 / "config.json").read_bytes())
    return out


def refused(code: str, call, *arguments) -> DsxError:
    with pytest.raises(DsxError) as err:
        call(*arguments)
    assert err.value.code == code, err.value
    return err.value


def by_hand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """定义本身：每个元素乘它那一块的 scale，float64 里算，再舍入一次。"""
    rows, columns = np.indices(codes.shape)
    product = codes.astype(np.float64) * scales.astype(np.float64)[rows // BLOCK[0], columns // BLOCK[1]]
    return product.astype(np.float32)


def test_the_published_set_of_tensors_is_fp8(fp8: Path):
    """注意力、MLP、专家的 Linear 是 FP8，各带一个 float32 scale；其余（含 eh_proj）不是。"""
    checkpoint = Checkpoint.open(fp8)
    store, config = checkpoint.store, checkpoint.config
    expected = expected_tensors(config) | expected_mtp_tensors(config, 0)
    quantized = {name for name in store if store[name].dtype == "F8_E4M3"}
    assert {name for name in expected if name.endswith("_proj.weight") and "eh_proj" not in name} | {
        name for name in expected if name.endswith("kv_a_proj_with_mqa.weight")
    } == quantized
    assert set(store) == set(expected) | {f"{name}_scale_inv" for name in quantized}
    assert store["model.layers.2.eh_proj.weight"].dtype == "BF16"
    assert set(checkpoint.mtp_tensors) == set(expected_mtp_tensors(config, 0))


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 32 * 30, 64 << 20])
def test_dequantised_exactly_block_by_block(fp8: Path, chunk_bytes: int):
    """每个 FP8 张量（含专家叠放与 MTP 层）都与定义逐位相同，不论分几块读。"""
    checkpoint = Checkpoint.open(fp8)
    store = checkpoint.store
    recipes = weight_recipes(checkpoint.config, "float32") | mtp_recipes(checkpoint.config, 0, "float32")
    bound = bind_recipes(recipes, checkpoint)
    assert {r.block_size for r in bound.values()} == {None, BLOCK}
    for name, recipe in bound.items():
        if recipe.block_size is None:
            assert recipe == recipes[name]
            continue
        want = np.stack([by_hand(store.read(s), store.read(f"{s}_scale_inv")) for s in recipe.sources])
        chunks = list(materialize(name, recipe, store, chunk_bytes))
        got = np.concatenate([chunk.reshape(-1) for chunk in chunks])
        assert np.array_equal(got, want.reshape(-1))
        assert np.array_equal(load_array(name, recipe, store).reshape(-1), got)


def test_every_code_is_exact(tmp_path: Path):
    """254 个有限的 E4M3 码（含次正规数与负零）乘 1.0 都无损。"""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].reshape(2, 127)
    arrays = {"w": torch.from_numpy(codes).view(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 7)}
    save_file(arrays, tmp_path / "model.safetensors")
    from deepseek_export.checkpoint.store import TensorStore

    recipe = Recipe(op="copy", sources=("w",), shape=(2, 127), dtype="float32", block_size=BLOCK)
    got = load_array("w", recipe, TensorStore.open(tmp_path))
    assert np.array_equal(got, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.array_equal(np.signbit(got), (codes & 0x80) != 0)


def test_swiglu_pairs_are_dequantised_too(fp8: Path):
    """stack_swiglu 的 gate、up 行交错不受分块影响。"""
    checkpoint = Checkpoint.open(fp8)
    prefix = "model.layers.1.mlp.experts"
    sources = tuple(f"{prefix}.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up"))
    recipe = Recipe(op="stack_swiglu", sources=sources, shape=(4, 32, 32), dtype="float32")
    bound = bind_recipes({"w": recipe}, checkpoint)["w"]
    got = np.concatenate(list(materialize("w", bound, checkpoint.store, 1))).reshape(recipe.shape)
    for e in range(4):
        for offset, source in enumerate(sources[2 * e : 2 * e + 2]):
            want = by_hand(checkpoint.store.read(source), checkpoint.store.read(f"{source}_scale_inv"))
            assert np.array_equal(got[e, offset::2], want)


def test_agrees_with_transformers(fp8: Path):
    """transformers 自己的反量化得到同样的 float32。"""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = type("Config", (), {"weight_block_size": BLOCK, "dequantize": True})
    quantizer = type("Quantizer", (), {"quantization_config": config})()
    arrays = load_file(fp8 / "model.safetensors")
    # 它要求除得尽：取恰好整块的一角。
    weight, scales = arrays[O_PROJ][:24, : 20 // 2 * 2][:, :16], arrays[f"{O_PROJ}_scale_inv"]
    block = type("Config", (), {"weight_block_size": (12, 16), "dequantize": True})
    quantizer.quantization_config = block
    want = module.Fp8Dequantize(quantizer)._dequantize_one(
        weight.contiguous(), scales[:2, :1].contiguous(), torch.float32
    )
    codes, corner = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scales[:2, :1].numpy()
    assert np.array_equal(by_hand(codes, corner), want.numpy())


def test_quantiser_of_the_maker_is_close(tmp_path: Path):
    """造检查点用的量化：每个元素的误差不超过所在块最大值的 1/28（E4M3 在最大处的半个步长）。"""
    weight = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    codes, scales = quantize_fp8(weight, BLOCK)
    assert scales.shape == (3, 3)
    error = np.abs(by_hand(codes, scales) - weight)
    rows, columns = np.indices(weight.shape)
    assert (error <= scales[rows // BLOCK[0], columns // BLOCK[1]] * 448 / 28).all()


class TestRefusals:
    """拿不准就拒绝。"""

    def test_missing_scale(self, fp8: Path, tmp_path: Path):
        path = changed(fp8, tmp_path, (f"{O_PROJ}_scale_inv",))
        assert f"{O_PROJ}_scale_inv" in refused("DSX-E111", Checkpoint.open, path).what

    def test_scale_without_fp8_weight(self, fp8: Path, tmp_path: Path):
        key = O_PROJ.replace(".", "__")
        path = changed(fp8, tmp_path, **{key: load_file(fp8 / "model.safetensors")[O_PROJ].bfloat16()})
        assert f"{O_PROJ}_scale_inv" in refused("DSX-E112", Checkpoint.open, path).what

    @pytest.mark.parametrize(("shape", "code"), [((2, 1), "DSX-E113"), ((3, 2), "DSX-E113")])
    def test_scale_shape(self, fp8: Path, tmp_path: Path, shape, code):
        key = f"{O_PROJ}_scale_inv".replace(".", "__")
        assert (
            O_PROJ in refused(code, Checkpoint.open, changed(fp8, tmp_path, **{key: torch.ones(shape)})).what
        )

    def test_scale_dtype(self, fp8: Path, tmp_path: Path):
        key = f"{O_PROJ}_scale_inv"
        half = load_file(fp8 / "model.safetensors")[key].bfloat16()
        path = changed(fp8, tmp_path, **{key.replace(".", "__"): half})
        assert key in refused("DSX-E114", Checkpoint.open, path).what

    def test_fp8_vector(self, fp8: Path, tmp_path: Path):
        path = changed(fp8, tmp_path, model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn))
        assert "model.norm.weight" in refused("DSX-E114", Checkpoint.open, path).what

    def test_undeclared_fp8(self, fp8: Path, tmp_path: Path):
        path = changed(fp8, tmp_path)
        write_checkpoint(tmp_path / "plain", TINY, mtp=True)
        (path / "config.json").write_bytes((tmp_path / "plain/config.json").read_bytes())
        refused("DSX-E114", Checkpoint.open, path)

    def test_declared_without_fp8(self, fp8: Path, tmp_path: Path):
        path = write_checkpoint(tmp_path / "plain", TINY)
        (path / "config.json").write_bytes((fp8 / "config.json").read_bytes())
        refused("DSX-E120", Checkpoint.open, path)

    def test_mixed_experts(self, fp8: Path, tmp_path: Path):
        plain = load_file(fp8 / "model.safetensors")[DOWN].bfloat16()
        path = changed(fp8, tmp_path, (f"{DOWN}_scale_inv",), **{DOWN.replace(".", "__"): plain})
        checkpoint = Checkpoint.open(path)
        recipes = weight_recipes(checkpoint.config, "float32")
        assert DOWN in refused("DSX-E120", bind_recipes, recipes, checkpoint).what

    @pytest.mark.parametrize("where", ["code", "scale"])
    def test_nan(self, fp8: Path, tmp_path: Path, where: str):
        """NaN 的码与无穷的 scale：点名张量与整个张量里的坐标。"""
        arrays = load_file(fp8 / "model.safetensors")
        name = O_PROJ if where == "code" else f"{O_PROJ}_scale_inv"
        bad: Any = arrays[name].clone()
        if where == "code":
            bad.view(torch.uint8)[25, 3] = 0x7F
        else:
            bad[2, 0] = float("inf")
        checkpoint = Checkpoint.open(changed(fp8, tmp_path, **{name.replace(".", "__"): bad}))
        recipe = bind_recipes(weight_recipes(checkpoint.config, "float32"), checkpoint)[O_PROJ]
        error = refused("DSX-E115", lambda: list(materialize(O_PROJ, recipe, checkpoint.store, 1)))
        assert f"{O_PROJ}[{25 if where == 'code' else 24}, " in error.what


def test_twin_has_the_same_bits(tmp_path: Path):
    """fp8_twins 造的孪生检查点与反量化的结果逐位相同。"""
    fp8, twin = (Checkpoint.open(path) for path in fp8_twins(tmp_path, FP8))
    recipes = weight_recipes(fp8.config, "float16")
    for name, recipe in bind_recipes(recipes, fp8).items():
        want = load_array(name, recipes[name], twin.store)
        assert np.array_equal(load_array(name, recipe, fp8.store), want)
