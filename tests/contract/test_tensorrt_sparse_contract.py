"""specs/dsa 的 DSA-10：稀疏注意力下沉到 TensorRT，没有 GPU 也建得出引擎；下沉后的图在 ONNX Runtime 上与参考实现相等。"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import deepseek_export
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import packed_int4
from deepseek_export.engine.build import build_engine_bytes
from deepseek_export.engine.flavour import choose, load
from deepseek_export.engine.layers import layer_counts, parse_layers
from deepseek_export.engine.plugins import registered_creators
from deepseek_export.progress import Progress
from tests.engines import assert_listing, assert_plugin_layers, widening_layers
from tests.fake_gpu import FakeGpu
from tools.make_engine_graphs import WIDE, WIDE_FP8, build_for, make_bundle
from tools.make_graphs import CONFIGS

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

#: 小的 V3.2：每层自己排名。
V32 = CONFIGS["deepseek_v3"] | {
    "model_type": "deepseek_v32",
    "index_topk": 16,
    "index_head_dim": 12,
    "index_n_heads": 4,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """小 GLM-5：第一层自己排名，第二层沿用；tensorrt-rtx、float16。"""
    return make_bundle("glm_moe_dsa", tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def built(bundle: Bundle):
    return build_for(bundle, 89)


def test_each_indexer_and_each_attention_is_one_plugin_layer(bundle: Bundle, built):
    """DSA-10：解码的配置里每个索引器、每层注意力恰好一个插件层，沿用的层没有索引器；prefill 的索引器也是插件，注意力融成原生核。"""
    config, layers = bundle.manifest.model, built.layers["model.plan"]
    assert_plugin_layers(layers, config.num_hidden_layers, config.num_moe_layers, 1)
    found = [layer for layer in layers["prefill"] if layer.op == "IndexTopK"]
    assert [layer.onnx for layer in found] == [["layers.0.self_attn.indexer/IndexTopK"]]
    assert built.record.plans["model.plan"].unfused_attention == []


def test_layers_match_what_is_recorded(built):
    """DSA-10：引擎的层逐行记在 graphs/engines/。"""
    assert_listing("glm_moe_dsa", 89, built.layers)


def test_the_index_cache_is_written_in_place(bundle: Bundle):
    """DSA-10：自己排名的层多一个索引缓存，也由 KV_CACHE_UPDATE 原地更新（没有整块抄一遍的层，否则建不出来）。"""
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    caches = {value.name for value in graph.input if "cache" in value.name}
    assert caches == {"kv_cache.0", "index_cache.0", "kv_cache.1"}
    scatters = {node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
    assert scatters == caches


def test_without_plugins_the_function_bodies_build(built):
    """DSA-10：插件没有登记时，同一个 ONNX 由函数体建成原生层。"""
    flavour = choose("rtx")
    trt = load(flavour)
    registry, creators = trt.get_plugin_registry(), registered_creators(trt)
    for creator in creators.values():
        assert registry.deregister_creator(creator)
    try:
        profiles = built.record.plans["model.plan"].profiles
        _, text = build_engine_bytes(trt, flavour, built.path / "model.onnx", 89, profiles, Progress())
    finally:
        for creator in creators.values():
            assert registry.register_creator(creator, "dsx")
    for layers in parse_layers(text, list(profiles), {}).values():
        counts = layer_counts(layers)
        assert "custom_layer" not in counts
        assert counts["gemm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("profile", ["mla+moe", "baseline", "full"])
def test_v32_builds(tmp_path: Path, profile: str, target: str):
    """DSA-10：小 V3.2，每层自己排名，草稿有自己的索引器；MLA 关闭时索引器仍是插件。"""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", V32, mtp=profile == "full")
    made = deepseek_export.export(checkpoint, tmp_path / "out", profile, target=target, dtype="float16")
    config = made.manifest.model
    if target == "tensorrt":
        return  # 完整的 TensorRT 只在目标 GPU 上建
    engine = build_for(made, 89)
    layers = engine.layers["model.plan"]
    if profile != "baseline":
        assert_plugin_layers(
            layers, config.num_hidden_layers, config.num_moe_layers, config.num_hidden_layers
        )
    if profile == "full":
        assert_plugin_layers(engine.layers["mtp.plan"], 1, 1, 1)
    assert sum(layer.op == "IndexTopK" for layer in layers["decode"]) == config.num_hidden_layers


_INDEX = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "v_head_dim")
#: 宽度都是 32 的倍数的稀疏模型：检查点的配置，几层自己排名。
QUANTISED = {
    "deepseek_v32": (WIDE | _INDEX | {"model_type": "deepseek_v32"}, 2),
    "glm_moe_dsa": (CONFIGS["glm_moe_dsa"] | {key: WIDE[key] for key in _WIDTHS} | _INDEX, 1),
}
#: 两层各四个注意力的、三个 MLP 的；int8 的另有 lm_head，FP8 检查点里它不是 FP8；int4 的由编译器融，没有插件。
LINEARS = {"int8": 15, "int4": 0, "fp8": 14}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("family", QUANTISED)
def test_quantised_sparse_models_read_their_codes(family: str, kind: str, tmp_path: Path):
    """DSA-10、TRT-13、TRT-17：量化的 V3.2、GLM-5：注意力与索引器的插件一个不少，专家、线性层连同索引器的 wq_b、wk 都读码，没有一层只还原权重，码原样在 plan 里。"""
    config, indexers = QUANTISED[family]
    coded = {"quantization_config": WIDE_FP8["quantization_config"]} if kind == "fp8" else {}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config | coded, dtype="bfloat16")
    quantization = None if kind == "fp8" else deepseek_export.Quantization(kind=kind)
    options = {"target": "tensorrt-rtx", "dtype": "bfloat16", "weights": "reference"}
    made = deepseek_export.export(
        checkpoint, tmp_path / "out", "mla+moe", quantization=quantization, **options
    )
    engine, model = build_for(made, 89), made.manifest.model
    layers = engine.layers["model.plan"]
    linears = LINEARS[kind] + (2 * indexers if LINEARS[kind] else 0)
    counts = (model.num_hidden_layers, model.num_moe_layers, indexers, "QuantizedMoeExperts")
    assert_plugin_layers(layers, *counts, linears)
    for found in layers.values():
        assert widening_layers(found) == []
    if kind == "fp8":
        return  # 字节是检查点的，由 TRT-17 的测试逐个核对
    plan = (engine.path / "model.plan").read_bytes()
    arrays = BundleWeights(made).arrays(made.manifest.main.by_recipe)
    codes = {name: array for name, array in arrays.items() if name.endswith(kind)}
    assert {name.removesuffix(f".{kind}") for name in codes} == set(made.manifest.quantization.tensors)
    for name, array in codes.items():
        assert (packed_int4(array) if kind == "int4" else array).tobytes() in plan, name


@pytest.mark.slow
def test_sessions_carry_the_index_cache(tmp_path: Path):
    """DSA-10：会话里索引缓存与潜缓存一样原地更新、回滚：续写越过名额，投机与否、一批，与 ONNX Runtime 上逐个相同（替身见 tests/fake_gpu.py）。"""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", CONFIGS["glm_moe_dsa"], dtype="float16", mtp=True)
    made = deepseek_export.export(
        checkpoint, tmp_path / "out", "full", target="tensorrt-rtx", dtype="float16"
    )
    prompts = [[5, 9, 23, 60, 7], [44, 3, 2, *range(9, 27)]]
    with pytest.MonkeyPatch.context() as patch:
        FakeGpu(patch).build(made)
        here, there = (deepseek_export.load(made.path, backend=name) for name in ("ort", "trt"))
        for speculative in (False, None):
            want, got = (
                one.generate(prompts, max_new_tokens=24, ignore_eos=True, speculative=speculative)
                for one in (here, there)
            )
            assert got.token_ids == want.token_ids


@pytest.mark.slow
def test_lowered_bundle_passes_parity_on_onnxruntime(saved, tmp_path: Path):
    """DSA-10：下沉后的小 GLM-5 在 ONNX Runtime 上过 op、block、model 三级校验，与 transformers 的 greedy 逐个相同，越过名额。"""
    bundle = deepseek_export.export(
        saved("glm-dsa")[1].path, tmp_path / "out", "mla+moe", target="tensorrt-rtx"
    )
    report = deepseek_export.verify(bundle.path, levels=("op", "block", "model", "tokens"), steps=40)
    assert report.passed, report.first_failure
    ops = {case.name.split()[1] for case in report.cases if case.level == "op"}
    assert {"LightningIndexer", "SparseMlaAttention"} <= ops
