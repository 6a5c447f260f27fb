"""specs/tensorrt 的 TRT-19：``mla.cache_dtype=int8`` 的引擎。没有 GPU 时能证明的：图、层、缓存的字节数、会话的地址与别名。"""

from __future__ import annotations

import onnx
import pytest

import deepseek_export
from deepseek_export.backend.tensorrt.engine import graph_contract
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.engine.derived import buildable_bundle, engine_bundle
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.engine.graph import shared_outputs
from tests.contract.test_mtp_contract import SMALL
from tests.engines import assert_listing, assert_plugin_layers
from tests.fake_gpu import FakeGpu
from tools.make_engine_graphs import build_for, make_bundle

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

NAME, INT8 = "wide.int8-cache", ["mla.cache_dtype=int8"]
PROMPTS = [[5, 9, 23, 100, 7], [44, 3, 2, *range(9, 27)]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """小的 bfloat16 模型，缓存 int8，tensorrt-rtx。"""
    return make_bundle(NAME, tmp_path_factory.mktemp("int8-cache"))


@pytest.fixture(scope="module")
def built(bundle: Bundle):
    return build_for(bundle, 89)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small") / "ck", SMALL, dtype="float16", mtp=True)


def test_the_cache_is_written_and_read_by_plugins(bundle: Bundle, built):
    """TRT-19：两个配置里每层恰好一个写入的插件，没有一层把缓存抄一遍（否则建不出来）；解码由插件读码，prefill 融成原生注意力。"""
    config, layers = bundle.manifest.model, built.layers["model.plan"]
    counts = (config.num_hidden_layers, config.num_moe_layers)
    assert_plugin_layers(layers, *counts, updates=config.num_hidden_layers)
    written = [layer for layer in layers["prefill"] if layer.op == "LatentCacheUpdate"]
    assert [layer.onnx for layer in written] == [
        [f"layers.{i}.self_attn/mla/LatentCacheUpdate"] for i in range(config.num_hidden_layers)
    ]
    assert built.record.plans["model.plan"].unfused_attention == []


def test_layers_match_what_is_recorded(built):
    """TRT-19：引擎的层逐行记在 graphs/engines/。"""
    assert_listing(NAME, 89, built.layers)


def test_the_cache_takes_as_many_bytes_as_its_rows(bundle: Bundle, built):
    """TRT-19：引擎的缓存输入输出是 int8，一个 token 一层是 16 的倍数个字节；会话按它分配，比 bfloat16 的少。"""
    config, layers = bundle.manifest.model, bundle.manifest.model.num_hidden_layers
    width = config.latent_cache_width(True, aligned=True)
    assert width % 16 == 0
    assert width - config.latent_cache_width(True) < 16
    graph = onnx.load(built.path / "model.onnx", load_external_data=False).graph
    caches = [value for value in (*graph.input, *graph.output) if "cache" in value.name]
    assert len(caches) == 2 * layers
    for value in caches:
        tensor = value.type.tensor_type
        assert tensor.elem_type == onnx.TensorProto.INT8
        assert [dim.dim_value for dim in tensor.shape.dim][1:] == [1, built.record.shapes.capacity, width]
    contract = graph_contract(bundle.manifest.main, built.record.plans["model.plan"].best)
    assert contract.caches.bytes_per_token == bundle.manifest.cache.bytes_per_token == layers * width
    assert width < 2 * config.latent_cache_values
    shared = shared_outputs(graph)
    assert shared == {f"kv_cache_out.{i}": f"kv_cache.{i}" for i in range(layers)}


@pytest.mark.slow
def test_lowered_bundle_passes_parity_on_onnxruntime(checkpoint, tmp_path):
    """TRT-19、TRT-2：下沉之后的图在 ONNX Runtime 上过 op、block、model 三级校验。"""
    options = {"target": "tensorrt-rtx", "dtype": "float16", "overrides": INT8}
    made = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", **options)
    assert made.manifest.cache.dtype == "int8"
    report = deepseek_export.verify(made.path, levels=("op", "block", "model"))
    assert report.passed, report.first_failure
    assert {"op", "block", "model"} <= {case.level for case in report.cases}


@pytest.mark.slow
def test_sessions_write_the_cache_in_place(checkpoint, tmp_path, monkeypatch):
    """TRT-19：会话里 int8 的缓存原地更新、回滚：投机与否、一批、长短不齐，与 ONNX Runtime 上逐个相同（替身见 tests/fake_gpu.py）；由 portable 的 bundle 另导出的也是 int8。"""
    options = {"profile": "full", "dtype": "float16", "overrides": INT8}
    portable = deepseek_export.export(checkpoint, tmp_path / "portable", **options)
    made = buildable_bundle(portable, FLAVOURS["rtx"])
    assert (made.manifest.cache.dtype, made.manifest.profile) == ("int8", portable.manifest.profile)
    FakeGpu(monkeypatch).build(made)
    assert engine_bundle(portable) == made
    here, there = deepseek_export.load(made.path), deepseek_export.load(portable.path, backend="trt")
    for speculative in (False, None):
        want, got = (
            one.generate(PROMPTS, max_new_tokens=24, ignore_eos=True, speculative=speculative)
            for one in (here, there)
        )
        assert got.token_ids == want.token_ids
