"""specs/tensorrt：下沉后的图在 ONNX Runtime 上的校验，以及 bfloat16、量化的引擎；各用自己的 bundle。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import packed_int4
from tests.engines import assert_plugin_layers, refused, weight_bytes, widening_layers
from tools.make_engine_graphs import WIDE, build_for, make_checkpoint

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """deepseek_v3 小配置的检查点。"""
    return make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("targets"))


def assert_parity(bundle: Bundle) -> None:
    report = deepseek_export.verify(bundle.path, levels=("op", "block", "model"))
    assert report.passed, report.first_failure
    assert {case.level for case in report.cases} - {"activations"} == {"op", "block", "model"}


def test_lowered_float32_bundle_passes_parity_on_onnxruntime(exported):
    """TRT-2：tensorrt-rtx 目标的 bundle 在 ONNX Runtime 上过 op、block、model 三级校验。"""
    assert_parity(exported("v3-yarn", "mla+moe", "tensorrt-rtx"))


def test_lowered_float16_bundle_passes_parity_on_onnxruntime(checkpoint, tmp_path):
    """TRT-2：同上，float16。"""
    options = {"target": "tensorrt-rtx", "dtype": "float16"}
    assert_parity(deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", **options))


@pytest.mark.slow
def test_bfloat16_is_lowered_and_built_but_not_run_on_onnxruntime(checkpoint, tmp_path):
    """TRT-11：bfloat16 的图下沉、建成引擎，插件一个不少；ONNX Runtime 上按码拒绝。"""
    options = {"dtype": "bfloat16"}
    refused("DSX-E321", lambda: deepseek_export.export(checkpoint, tmp_path / "no", "mla+moe", **options))
    options["target"] = "tensorrt-rtx"
    made = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", **options)
    assert made.manifest.dtype == "bfloat16"
    assert made.manifest.float32_islands["RMSNormalization"] > 0
    assert made.manifest.float32_islands["TopK"] > 0
    report = json.loads((made.path / "reports/export.json").read_text(encoding="utf-8"))
    listed = report["float32_islands"]["model.onnx"]
    assert {op: len(names) for op, names in listed.items()} == made.manifest.float32_islands
    assert all("layers." in name or "norm" in name for name in listed["RMSNormalization"])
    refused("DSX-E321", deepseek_export.verify, made.path)
    refused("DSX-E321", deepseek_export.compare, made.path)
    refused("DSX-E321", deepseek_export.load, made.path)
    config = made.manifest.model
    layers = build_for(made, 89).layers["model.plan"]
    assert_plugin_layers(layers, config.num_hidden_layers, config.num_moe_layers)


def wide_bundle(kind: str | None, folder: Path) -> Bundle:
    """宽度都是 32 的倍数的小模型，按引用。"""
    checkpoint = write_checkpoint(folder / "checkpoint", WIDE, dtype="bfloat16")
    quantization = kind and deepseek_export.Quantization.model_validate({"kind": kind})
    options = {"target": "tensorrt-rtx", "dtype": "bfloat16", "weights": "reference"}
    return deepseek_export.export(
        checkpoint, folder / "out", "mla+moe", quantization=quantization or None, **options
    )


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_quantised_weights_stay_quantised_in_the_engine(kind: str, tmp_path):
    """TRT-13：码原样在 plan 里；没有一层只还原不相乘：int4 的还原与矩阵乘融成一层，int8 的与专家的由插件自己读。"""
    bundle = wide_bundle(kind, tmp_path)
    assert bundle.manifest.fallbacks == []
    engine = build_for(bundle, 89)
    plan = (engine.path / "model.plan").read_bytes()
    arrays = BundleWeights(bundle).arrays(bundle.manifest.main.by_recipe)
    codes = {name: array for name, array in arrays.items() if name.endswith(kind)}
    assert len(codes) == len(bundle.manifest.quantization.tensors)
    for name, array in codes.items():
        assert (packed_int4(array) if kind == "int4" else array).tobytes() in plan, name
    config, layers = bundle.manifest.model, engine.layers["model.plan"]
    linears = len(codes) - 3 * config.num_moe_layers
    for found in layers.values():
        assert widening_layers(found) == []
        restored = [layer for layer in found if any("/DequantizeLinear" in name for name in layer.onnx)]
        assert len(restored) == (linears if kind == "int4" else 0)
    counts = (config.num_hidden_layers, config.num_moe_layers, 0, "QuantizedMoeExperts")
    assert_plugin_layers(layers, *counts, linears if kind == "int8" else 0)


@pytest.mark.slow
def test_quantised_engines_move_fewer_bytes(tmp_path):
    """TRT-13：由层的清单算，解码一步搬的权重：int4 少于 int8，int8 少于没有量化的。"""
    moved = {}
    for kind in (None, "int8", "int4"):
        (folder := tmp_path / str(kind)).mkdir()
        engine = build_for(wide_bundle(kind, folder), 89)
        moved[kind] = weight_bytes(engine, "decode")
    assert moved["int4"] < moved["int8"] < 0.7 * moved[None]
