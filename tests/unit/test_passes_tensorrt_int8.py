"""int8 缓存下沉到 TensorRT：写进去的字节、两条路径的结果与别的目标相同，图的缓存改宽，函数体与参考实现相同。"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from deepseek_export.capture import capture_model
from deepseek_export.capture.bodies import latent_attention_body, latent_cache_update_body
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.errors import DsxError
from deepseek_export.ops.int8_cache import decode_rows, encode_rows, padded_rows
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.latent_cache_update import latent_cache_update
from deepseek_export.passes import GraphModule, lower
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS, LowerMlaToTensorrtPass
from deepseek_export.profile import resolve_profile
from deepseek_export.reference.weights import by_torch
from tests.models import TOLERANCE, distance, model_config, one_node_model, ort_session

pytestmark = pytest.mark.unit

INT8 = ["mla.cache_dtype=int8"]


@functools.cache
def captured(variant: str, form: str = "auto"):
    return capture_model(model_config(variant), resolve_profile("mla", [*INT8, f"mla.form={form}"]))


def garbage(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-128, 128, shape, np.int8)


SHAPES = ((1, 1, 8, (0,)), (2, 8, 40, (0, 31)), (3, 0, 16, (1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_update_body_equals_the_reference(dtype):
    """TRT-2、MLA-7：写入的函数体写出同样的字节，别的行不动；没有新 token 就原样。"""
    c, number = model_config("v3"), by_torch(dtype).numpy
    rng, session = np.random.default_rng(0), None
    for B, S, T, past in SHAPES:
        feeds = {
            "c_kv": rng.standard_normal((B, S, c.kv_lora_rank)).astype(number),
            "k_pe": rng.standard_normal((B, S, c.qk_rope_head_dim)).astype(number),
            "kv_cache": garbage(B, 1, T, c.latent_cache_width(True, aligned=True)),
            "past_lens": np.array(past, np.int64),
        }
        if session is None:
            model = one_node_model(latent_cache_update_body(c, dtype), feeds, {"kv_cache_out": np.int8})
            session = ort_session(model)
        (written,) = session.run(None, feeds)
        assert np.array_equal(written, latent_cache_update(*map(torch.from_numpy, feeds.values())).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_body_equals_the_reference(dtype):
    """TRT-2：int8 缓存的函数体与 eager 一致；query 为空（走 prefill 路径时）得到空的结果。"""
    c, number = model_config("v3"), by_torch(dtype).numpy
    r, H, values = c.kv_lora_rank, c.num_attention_heads, c.latent_cache_values
    rng, session = np.random.default_rng(0), None
    for B, S, T, past in SHAPES:
        latents = torch.from_numpy(rng.standard_normal((B, 1, T, values)).astype(np.float32))
        rows = encode_rows(latents[..., :r], latents[..., r:])
        feeds = {
            "q": rng.standard_normal((B, S, H, values)).astype(number),
            "kv_cache": padded_rows(rows, c.latent_cache_width(True, aligned=True)).numpy(),
            "past_lens": np.array(past, np.int64),
        }
        if session is None:
            body = latent_attention_body(c, dtype, torch.int8)
            model = one_node_model(body, feeds, {"context": number}, scale=0.2, kv_lora_rank=r)
            session = ort_session(model)
        (got,) = session.run(None, feeds)
        if S == 0:
            assert got.shape == (H, 0, r)
            continue
        assert (
            distance(got, latent_attention(*map(torch.from_numpy, feeds.values()), 0.2, r)) < TOLERANCE[dtype]
        )


def test_whole_model_is_equal_on_both_sides_of_the_split(saved):
    """TRT-19：下沉之后的图在 ONNX Runtime 上与 portable 相等，S 在分界两侧都比，长度不等；缓存里的字节前面相同、末尾是零；没有写过的行是任意的字节也一样。"""
    config, store = model_config("v3"), saved("v3")[1].store
    profile = resolve_profile("mla", INT8)
    models = [
        lower(captured("v3"), config, profile, "float32", target) for target in ("portable", "tensorrt-rtx")
    ]
    weights = {name: load_array(name, recipe, store) for name, recipe in models[0].weights.items()}
    sessions = [ort_session(model.proto) for model in models]
    widths = [config.latent_cache_width(True, aligned) for aligned in (False, True)]
    assert widths[0] < widths[1]
    for model, width in zip(models, widths, strict=True):
        caches = [v for v in (*model.proto.graph.input, *model.proto.graph.output) if "kv_cache" in v.name]
        assert len(caches) == 2 * config.num_hidden_layers
        assert {value.type.tensor_type.shape.dim[3].dim_value for value in caches} == {width}
    rng = np.random.default_rng(1)
    B, T, r = 2, 64, config.kv_lora_rank
    for S in (1, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1, 30):
        past = np.array([0, 17], np.int64)
        feeds = {
            "input_ids": rng.integers(0, config.vocab_size, (B, S)),
            "past_lens": past,
            "logits_positions": np.broadcast_to(np.arange(S), (B, S)).copy(),
            **weights,
        }
        caches = {}
        for layer in range(config.num_hidden_layers):
            latents = torch.from_numpy(0.3 * rng.standard_normal((B, 1, T, config.latent_cache_values)))
            rows = encode_rows(latents[..., :r], latents[..., r:])
            caches[f"kv_cache.{layer}"] = rows
        want = sessions[0].run(None, feeds | {name: rows.numpy() for name, rows in caches.items()})
        wide = {name: padded_rows(rows, widths[1]).numpy() for name, rows in caches.items()}
        for rows in wide.values():
            for b in range(B):
                rows[b, :, past[b] + S :] = garbage(1, T - past[b] - S, widths[1])
        got = sessions[1].run(None, feeds | wide)
        names = [value.name for value in models[0].proto.graph.output]
        for name, one, other in zip(names, want, got, strict=True):
            if one.dtype != np.int8:
                assert distance(other, one) < TOLERANCE[torch.float32], (name, S)
                continue
            dr = config.qk_rope_head_dim
            for b, end in enumerate(past + S):
                assert not other[b, :, :end, widths[0] :].any()
                one_rows, other_rows = (torch.from_numpy(array[b, :, :end]) for array in (one, other))
                # 第一层的输入逐位相同，写进去的字节也是；之后的层差在矩阵乘的次序上。
                if name.endswith(".0"):
                    assert torch.equal(one_rows, other_rows[..., : widths[0]])
                decoded = [decode_rows(rows, r, dr) for rows in (one_rows, other_rows)]
                assert distance(decoded[1].numpy(), decoded[0]) < 1e-2


@pytest.mark.parametrize(
    ("form", "present"),
    [("auto", {"LatentAttention", "Attention"}), ("absorb", {"LatentAttention"}), ("naive", {"Attention"})],
)
def test_each_form_writes_through_the_plugin(form, present):
    """TRT-19：每层一个 ``LatentCacheUpdate``，没有 ``TensorScatter``；解码、prefill 的路径同浮点的缓存。"""
    module = GraphModule.from_captured(captured("v3", form), model_config("v3"), "float32", form)
    assert LowerMlaToTensorrtPass()(module).changed
    layers = module.config.num_hidden_layers
    counts = Counter(node.op for node in module.graph.nodes)
    assert (counts["LatentCacheUpdate"], counts["TensorScatter"]) == (layers, 0)
    assert {op for op in ("LatentAttention", "Attention") if counts[op] == layers} == present
    assert not LowerMlaToTensorrtPass()(module).changed


def test_sparse_attention_is_refused():
    """DSX-E322：绕过 ``check_cache`` 直接下沉的也拒绝。"""
    config = model_config("v32")
    module = GraphModule.from_captured(captured("v32"), config, "float32")
    with pytest.raises(DsxError, match="稀疏注意力的缓存是 int8") as caught:
        LowerMlaToTensorrtPass()(module)
    assert caught.value.code == "DSX-E322"
