"""稀疏注意力下沉到 TensorRT：结果不变，每处各有什么节点，两个插件核的函数体等于参考实现。"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from deepseek_export.capture import capture_model
from deepseek_export.capture.sparse_bodies import index_topk_body, sparse_latent_attention_body
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.ops.index_topk import index_topk
from deepseek_export.ops.lightning_indexer import lightning_indexer
from deepseek_export.ops.sparse_latent_attention import sparse_latent_attention
from deepseek_export.passes import GraphModule, lower
from deepseek_export.passes.lower_indexer_to_tensorrt import LowerIndexerToTensorrtPass
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS, LowerMlaToTensorrtPass
from deepseek_export.profile import resolve_profile
from deepseek_export.reference.weights import by_torch
from tests.models import DSA, TOLERANCE, distance, model_config, one_node_model, ort_session

pytestmark = pytest.mark.unit

TOPK, SCALE = DSA["index_topk"], 0.2
#: (B, S, T, past_lens)：T 不到、恰好、远过名额；空缓存，长短不一。
SHAPES = [(1, 1, 9, [0]), (2, 3, TOPK, [20, 0]), (2, 8, 90, [40, 3]), (1, 40, 64, [7])]


@functools.cache
def captured(variant: str, profile: str = "mla+moe"):
    return capture_model(model_config(variant), resolve_profile(profile))


def selection_inputs(B, S, T, past, dtype) -> list[torch.Tensor]:
    c, g = model_config("v32").indexer, torch.Generator().manual_seed(T)
    assert c is not None
    return [
        torch.randn(B, S, c.n_heads, c.head_dim, generator=g).to(dtype),
        torch.randn(B, S, c.n_heads, generator=g),
        torch.randn(B, 1, T, c.head_dim, generator=g).to(dtype),
        torch.tensor(past),
    ]


@pytest.mark.parametrize(("B", "S", "T", "past"), SHAPES)
def test_the_selection_is_that_of_the_indexer(B: int, S: int, T: int, past: list[int]):
    """DSA-10：对写好的缓存挑选，与 ``LightningIndexer`` 相同；T 不到名额也一样。"""
    q, w, cache, lens = selection_inputs(B, S, T, past, torch.float32)
    k = torch.randn(B, S, cache.shape[-1], generator=torch.Generator().manual_seed(3))
    indices, counts, written = lightning_indexer(q, w, k, cache, lens, TOPK)
    got = index_topk(q, w, written, lens, TOPK)
    assert torch.equal(got[0], indices)
    assert torch.equal(got[1], counts)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_bodies_equal_the_reference(dtype: torch.dtype):
    """DSA-10：两个函数体在 ONNX Runtime 上与 eager 一致；没有 query（走 prefill 的路时）注意力得到空的结果。"""
    config, number = model_config("v32"), by_torch(dtype).numpy
    rng, H, r = np.random.default_rng(0), config.num_attention_heads, config.kv_lora_rank
    sessions = []
    for B, S, T, past in [*SHAPES, (2, 0, 16, [1, 2])]:
        inputs = selection_inputs(B, S, T, past, dtype)
        names = ("q", "w", "index_cache", "past_lens")
        feeds = dict(zip(names, (one.numpy() for one in inputs), strict=True))
        chosen = index_topk(*inputs, TOPK) if S else (torch.zeros(B, 0, TOPK), torch.zeros(B, 0))
        want = [one.to(torch.int32) for one in chosen]
        rows = {
            "q": rng.standard_normal((B, S, H, config.latent_cache_values)).astype(number),
            "kv_cache": rng.standard_normal((B, 1, T, config.latent_cache_values)).astype(number),
            "indices": want[0].numpy(),
            "counts": want[1].numpy(),
        }
        if not sessions:
            bodies = index_topk_body(config, dtype, dtype), sparse_latent_attention_body(config, dtype, dtype)
            kinds = {"indices": np.dtype(np.int32), "counts": np.dtype(np.int32)}
            models = (
                one_node_model(bodies[0], feeds, kinds, topk=TOPK),
                one_node_model(bodies[1], rows, {"context": number}, scale=SCALE, kv_lora_rank=r),
            )
            sessions = [ort_session(model) for model in models]
        (context,) = sessions[1].run(None, rows)
        assert context.shape == (H, B * S, r)
        if S:
            for got, one in zip(sessions[0].run(None, feeds), want, strict=True):
                assert np.array_equal(got, one.numpy())
            attended = sparse_latent_attention(*map(torch.from_numpy, rows.values()), SCALE, r)
            assert distance(context, attended) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", [pytest.param("v32", marks=pytest.mark.slow), "glm-dsa"])
def test_whole_model_is_equal_on_both_sides_of_the_split(saved, variant: str):
    """DSA-10：下沉之后与 portable 相等：S 在分界两侧，T 在名额两侧，长短不一；prefill 时缓存里没有写过的行是 NaN 也一样。"""
    config, store, profile = model_config(variant), saved(variant)[1].store, resolve_profile("mla+moe")
    models = [
        lower(captured(variant), config, profile, "float32", target)
        for target in ("portable", "tensorrt-rtx")
    ]
    weights = {name: load_array(name, recipe, store) for name, recipe in models[0].weights.items()}
    assert models[0].weights == models[1].weights
    sessions = [ort_session(model.proto) for model in models]
    names = [value.name for value in models[0].proto.graph.input if "cache" in value.name]
    assert [name for name in names if "index" in name] == [
        f"index_cache.{layer}" for layer in range(config.num_hidden_layers) if config.runs_indexer(layer)
    ]
    rng = np.random.default_rng(1)
    widths = {"kv_cache": config.latent_cache_values, "index_cache": DSA["index_head_dim"]}
    for S, T in ((1, 64), (MAX_DECODE_TOKENS, 20), (MAX_DECODE_TOKENS + 1, 64), (30, 64)):
        past = np.array([0, min(17, T - S)], np.int64)
        feeds = {
            "input_ids": rng.integers(0, config.vocab_size, (2, S)),
            "past_lens": past,
            "logits_positions": np.broadcast_to(np.arange(S), (2, S)).copy(),
            **weights,
        }
        for name in names:
            shape = (2, 1, T, widths[name.partition(".")[0]])
            feeds[name] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        want, got = (session.run(None, feeds) for session in sessions)
        assert max(map(distance, got, want)) < TOLERANCE[torch.float32]
        if S <= MAX_DECODE_TOKENS:
            continue  # 解码的插件核不读没有写过的行（KERNEL-2），这里跑的是它的函数体
        for name in (name for name in names if name.startswith("kv_cache")):
            for row, length in enumerate(past):
                feeds[name][row, :, length + S :] = np.nan
        assert np.array_equal(sessions[1].run(["logits"], feeds)[0], got[0])


@pytest.mark.parametrize("form", ["auto", "absorb", "naive"])
def test_each_form_emits_its_own_path(form: str):
    """DSA-10：每个索引器一个 ``IndexTopK``，每层一次缓存写入；解码一个 ``SparseLatentAttention``，prefill 一个原生注意力。"""
    config = model_config("glm-dsa")
    module = GraphModule.from_captured(captured("glm-dsa"), config, "float32", form)
    layers = config.num_hidden_layers
    indexers = sum(map(config.runs_indexer, range(layers)))
    passes = LowerIndexerToTensorrtPass(), LowerMlaToTensorrtPass()
    assert [one(module).count for one in passes] == [indexers, layers]
    counts = Counter(node.op for node in module.graph.nodes)
    assert counts["TensorScatter"] == layers + indexers
    assert counts["IndexTopK"] == indexers
    assert counts["SparseLatentAttention"] == layers * (form != "naive")
    assert counts["Attention"] == layers * (form != "absorb")
    assert counts["LightningIndexer"] == counts["SparseMlaAttention"] == counts["LatentAttention"] == 0
    assert [(again.changed, again.count) for again in (one(module) for one in passes)] == [(False, 0)] * 2
