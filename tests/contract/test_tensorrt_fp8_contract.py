"""specs/tensorrt 的 TRT-17：TensorRT 的目标上，FP8 检查点的字节原样留着。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import deepseek_export
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.by_reference import BY_RECIPE_FILE
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.ops.table import QUANTIZED_LINEAR, QUANTIZED_MOE_EXPERTS
from deepseek_export.plan.written import written_bytes
from deepseek_export.profile import resolve_profile
from tests.contract.test_scale_contract import FP8, prefill_logits
from tests.engines import assert_plugin_layers
from tests.models import fp8_twins
from tools.make_engine_graphs import CASES, WIDE_FP8, build_for

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.experts.*.down_proj.weight"
CODED = (QUANTIZED_LINEAR.name, QUANTIZED_MOE_EXPERTS.name)
RTX = "tensorrt-rtx"


def with_block(*block: int) -> dict:
    return FP8 | {"quantization_config": FP8["quantization_config"] | {"weight_block_size": list(block)}}


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """FP8 检查点与它的 float32 孪生，都带 MTP 层；块小到大多除不尽。"""
    return fp8_twins(tmp_path_factory.mktemp("twins"), with_block(12, 16), mtp=True)


@pytest.fixture(scope="module")
def bundles(twins, tmp_path_factory) -> list[Bundle]:
    """两者 ``full`` 的 float32 bundle，打包；只读。"""
    out = tmp_path_factory.mktemp("bundles")
    return [deepseek_export.export(path, out / path.name, "full", target=RTX) for path in twins]


def test_bytes_are_the_checkpoints_and_nothing_is_lost(twins, bundles):
    """TRT-17：码与 scale 就是检查点的字节；logits 与还原之后再存的孪生逐位相同，所以对检查点没有损失。"""
    fp8, twin = bundles
    store, recipes = Checkpoint.open(twins[0]).store, fp8.manifest.weights.recipes
    weights = (fp8.path / "weights/model.safetensors").read_bytes()
    kept = {name for name in recipes if name.endswith(".fp8")}
    assert {f"{O_PROJ}.fp8", f"{DOWN}.fp8", "model.layers.2.mlp.experts.*.up_proj.weight.fp8"} <= kept
    for name in kept:
        sources = recipes[name].sources
        stacked = [np.stack([store.read(s + tail) for s in sources]) for tail in ("", "_scale_inv")]
        assert all(one.tobytes() in weights for one in stacked), name
    assert O_PROJ not in recipes
    assert DOWN not in recipes
    assert np.array_equal(prefill_logits(fp8), prefill_logits(twin))
    counts = fp8.manifest.main.op_counts
    config = fp8.manifest.model
    assert counts[f"dsx::{QUANTIZED_MOE_EXPERTS.name}"] == config.num_moe_layers
    # 每层 q_a、q_b、kv_a、o 与 MLP 或共享专家的三个。
    assert counts[f"dsx::{QUANTIZED_LINEAR.name}"] == 7 * config.num_hidden_layers
    assert all("w_kv_b 要浮点" in line for line in fp8.manifest.fallbacks)
    assert len(fp8.manifest.fallbacks) == len(fp8.manifest.graphs)
    assert twin.manifest.fallbacks == []


def test_the_bundle_equals_transformers(bundles):
    """TRT-17：以 transformers 为基准，各层级都校验通过。"""
    report = deepseek_export.verify(bundles[0].path, levels=("op", "block", "model"))
    assert report.first_failure is None
    assert report.oracle.startswith("transformers")


@pytest.mark.parametrize(
    "profile", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mla", "moe"))]
)
def test_the_planned_size_is_what_is_written(twins, bundles, profile: str, tmp_path: Path):
    """TRT-17、EXPORT-31：``dsx plan`` 与磁盘预检用的字节数，与改完图之后的配方一个字节不差；比还原之后的小得多。"""
    checkpoint = Checkpoint.open(twins[0])
    made = bundles[0]
    if profile != "full":
        options = {"target": RTX, "weights": "reference"}
        made = deepseek_export.export(twins[0], tmp_path / "out", profile, **options)
    resolved, modules = resolve_profile(profile), int(profile == "full")
    sizes = [
        sum(written_bytes(made.manifest.model, resolved, modules, "float32", tensorrt=True, fp8=fp8).values())
        for fp8 in (Fp8Sources.of(checkpoint), None)
    ]
    assert sizes[0] == sum(recipe.nbytes for recipe in made.manifest.weights.recipes.values())
    assert sizes[0] < 0.75 * sizes[1]
    # MoE 关闭的专家没有读码的插件：照旧还原，写明。
    assert any("没有读得了它的插件" in line for line in made.manifest.fallbacks) == (profile == "mla")


def test_linears_point_into_the_checkpoint(twins, tmp_path: Path):
    """TRT-17：按引用时线性层的码与 scale 直接指进检查点，不转置；专家在加载时叠成一个，不写盘；结果与打包的相同。"""
    bundle = deepseek_export.export(twins[0], tmp_path / "out", "mla+moe", target=RTX, weights="reference")
    store = Checkpoint.open(twins[0]).store
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(bundle.path / "model.onnx", load_external_data=False).graph.initializer
    }
    for name, source in ((f"{O_PROJ}.fp8", O_PROJ), (f"{O_PROJ}.fp8.scales", f"{O_PROJ}_scale_inv")):
        assert places[name]["location"] == "weights/model.safetensors"
        assert int(places[name]["offset"]) == store[source].offset
        assert int(places[name]["length"]) == store[source].nbytes
    assert places[f"{DOWN}.fp8"]["location"] == BY_RECIPE_FILE
    (made,) = BundleWeights(bundle).arrays([f"{DOWN}.fp8"]).values()
    assert made.dtype == np.int8
    referenced = prefill_logits(bundle)
    assert np.array_equal(referenced, prefill_logits(deepseek_export.pack(bundle.path)))


def test_other_targets_and_quantised_bundles_restore(twins, tmp_path: Path):
    """TRT-17：别的目标、``--quant`` 的照旧还原；scale 管的列数不是 2 的幂的检查点也是，写明原因。"""
    export = deepseek_export.export
    options = {"weights": "reference"}
    quantization = deepseek_export.Quantization(kind="int8", keep=("mlp.experts",))
    odd = write_checkpoint(tmp_path / "odd", with_block(12, 20), dtype="float32")
    made = [
        export(twins[0], tmp_path / "portable", "mla+moe", **options),
        export(twins[0], tmp_path / "int8", "mla+moe", target=RTX, quantization=quantization, **options),
        export(odd, tmp_path / "odd-out", "mla+moe", target=RTX, **options),
    ]
    for bundle in made:
        assert not any(name.endswith(".fp8") for name in bundle.manifest.weights.recipes)
        assert bundle.manifest.weights.recipes[DOWN].block_size is not None
    assert "没有读得了它的插件" in " ".join(made[2].manifest.fallbacks)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 89])
def test_the_engine_reads_the_bytes(sm: int, tmp_path: Path):
    """TRT-17：引擎里是检查点的字节，由插件读，没有还原它们的层；sm80 没有 FP8 也建得出来。"""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", WIDE_FP8, dtype="bfloat16")
    options = {"target": RTX, "dtype": "bfloat16"}
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", **options)
    engine = build_for(bundle, sm)
    plan, store = (engine.path / "model.plan").read_bytes(), Checkpoint.open(checkpoint).store
    for name, recipe in bundle.manifest.weights.recipes.items():
        if name.endswith(".fp8"):
            assert np.stack([store.read(source) for source in recipe.sources]).tobytes() in plan, name
    config, case = bundle.manifest.model, CASES["wide.fp8"]
    layers = engine.layers["model.plan"]
    assert_plugin_layers(
        layers, config.num_hidden_layers, config.num_moe_layers, 0, case.experts, case.linears
    )
