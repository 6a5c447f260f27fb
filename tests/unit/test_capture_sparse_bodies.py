"""capture/sparse_bodies.py：稀疏注意力两个算子的函数体在 ONNX Runtime 与 onnx 参考求值器上都等于 eager。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from deepseek_export.capture.sparse_bodies import lightning_indexer_body, sparse_mla_attention_body
from deepseek_export.ops.int8_cache import encode_rows
from deepseek_export.ops.int8_index import encode_keys
from deepseek_export.ops.lightning_indexer import lightning_indexer
from deepseek_export.ops.mla_attention import mla_attention
from deepseek_export.ops.sparse_mla_attention import sparse_mla_attention
from deepseek_export.reference.weights import by_torch
from tests.models import TOLERANCE, distance, model_config, one_node_model, ort_session

pytestmark = pytest.mark.unit

CONFIG = model_config("v32")
#: 名额 24 个。（B, S, T, past_lens）：T 不到、恰好、刚过、远过名额；解码与 prefill；长短不一的行。
SHAPES = [
    (1, 1, 9, [3]),
    (2, 3, 24, [20, 0]),
    (2, 1, 25, [24, 3]),
    (1, 40, 40, [0]),
    (3, 3, 60, [0, 57, 21]),
]


def index_inputs(B, S, T, past, dtype=torch.float32) -> dict[str, torch.Tensor]:
    c, g = CONFIG.indexer, torch.Generator().manual_seed(B * 100 + S * 10 + T)
    assert c is not None
    return {
        "q": torch.randn(B, S, c.n_heads, c.head_dim, generator=g).to(dtype),
        "w": torch.randn(B, S, c.n_heads, generator=g),
        "k": torch.randn(B, S, c.head_dim, generator=g).to(dtype),
        "index_cache": torch.randn(B, 1, T, c.head_dim, generator=g).to(dtype),
        "past_lens": torch.tensor(past),
    }


def attention_inputs(B, S, T, past, dtype, cache_dtype) -> dict[str, torch.Tensor]:
    c, g = CONFIG, torch.Generator().manual_seed(B * 100 + S * 10 + T)
    H, dn, dr, dv = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    r = c.kv_lora_rank

    def rand(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * spread).to(dtype)

    latent, rope = rand(B, 1, T, r), rand(B, 1, T, dr)
    cache = torch.cat([latent, rope], -1).to(cache_dtype)
    indices, counts, _ = lightning_indexer(*index_inputs(B, S, T, past).values(), 24)
    return {
        "q_nope": rand(B, S, H, dn),
        "q_pe": rand(B, S, H, dr),
        "c_kv": rand(B, S, r),
        "k_pe": rand(B, S, dr),
        "kv_cache": encode_rows(latent, rope) if cache_dtype == torch.int8 else cache,
        "past_lens": torch.tensor(past),
        "w_kv_b": rand(H * (dn + dv), r, spread=r**-0.5),
        "indices": indices,
        "counts": counts,
    }


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def runners(model: onnx.ModelProto) -> list[Callable[[Any], Any]]:
    onnx.checker.check_model(model, full_check=True)
    session, evaluator = ort_session(model), ReferenceEvaluator(model)
    return [lambda feeds: session.run(None, feeds), lambda feeds: evaluator.run(None, feeds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_indexer_body(dtype):
    """DSA-2：选中的位置、个数与写好的缓存都与 eager 逐个相同。"""
    kind = by_torch(dtype).numpy
    outputs = {"indices": np.int32, "counts": np.int32, "index_cache_out": kind}
    body = lightning_indexer_body(CONFIG, dtype, dtype)
    model = one_node_model(body, arrays(index_inputs(*SHAPES[0], dtype)), outputs, topk=24)
    for run in runners(model):
        for shape in SHAPES:
            inputs = index_inputs(*shape, dtype)
            for got, want in zip(run(arrays(inputs)), lightning_indexer(*inputs.values(), 24), strict=True):
                assert np.array_equal(got, want.numpy()), shape


def test_nothing_to_rank_needs_no_queries():
    """DSA-2：T 不超过名额时，没有 query 也选出同样的；eager 与函数体都是。"""
    body = lightning_indexer_body(CONFIG, torch.float32, torch.float32)
    outputs = {"indices": np.int32, "counts": np.int32, "index_cache_out": np.float32}
    few = [shape for shape in SHAPES if shape[2] <= 24]
    assert len(few) == 2
    for run in runners(one_node_model(body, arrays(index_inputs(*few[0])), outputs, topk=24)):
        for shape in few:
            inputs = index_inputs(*shape)
            without = inputs | {"q": inputs["q"][:, :0], "w": inputs["w"][:, :0]}
            want = lightning_indexer(*inputs.values(), 24)
            for got in (run(arrays(without)), lightning_indexer(*without.values(), 24)):
                assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), shape


def test_indexer_body_with_int8_keys():
    """DSA-13：int8 的索引 key：写好的字节逐位相同，选中的位置也是。"""
    outputs = {"indices": np.int32, "counts": np.int32, "index_cache_out": np.int8}
    body = lightning_indexer_body(CONFIG, torch.float32, torch.int8)

    def inputs(*shape) -> dict[str, torch.Tensor]:
        given = index_inputs(*shape)
        return given | {"index_cache": encode_keys(given["index_cache"])}

    for run in runners(one_node_model(body, arrays(inputs(*SHAPES[0])), outputs, topk=24)):
        for shape in SHAPES:
            given = inputs(*shape)
            for got, want in zip(run(arrays(given)), lightning_indexer(*given.values(), 24), strict=True):
                assert np.array_equal(got, want.numpy()), shape


@pytest.mark.parametrize(
    ("form", "dtype", "cache_dtype"),
    [
        ("auto", torch.float32, torch.float32),
        ("absorb", torch.float32, torch.float16),
        ("naive", torch.float16, torch.float16),
        ("auto", torch.float32, torch.int8),
    ],
)
def test_attention_body(form, dtype, cache_dtype):
    """DSA-3：输出与 eager 相等，缓存逐位相同；T 不超过名额时就是 MlaAttention 的那一种形式。"""
    outputs = {"o": by_torch(dtype).numpy, "kv_cache_out": by_torch(cache_dtype).numpy}
    body = sparse_mla_attention_body(CONFIG, form, dtype, cache_dtype)
    first = attention_inputs(*SHAPES[0], dtype, cache_dtype)
    for run in runners(one_node_model(body, arrays(first), outputs, scale=0.2)):
        for shape in SHAPES:
            inputs = attention_inputs(*shape, dtype, cache_dtype)
            o, cache = run(arrays(inputs))
            want, written = sparse_mla_attention(*inputs.values(), 0.2, form=form)
            assert distance(o, want) < TOLERANCE[dtype], shape
            assert np.array_equal(cache, written.numpy()), shape
            if shape[2] <= 24:
                dense = [tensor for name, tensor in inputs.items() if name not in ("indices", "counts")]
                assert torch.equal(want, mla_attention(*dense, 0.2, form=form)[0])


def test_the_body_reads_only_what_was_chosen():
    """DSA-3：没有选中的行填 NaN 也不影响结果：是收集，不是遮罩。"""
    inputs = attention_inputs(2, 1, 60, [40, 57], torch.float32, torch.float32)
    body = sparse_mla_attention_body(CONFIG, "auto", torch.float32, torch.float32)
    outputs = {"o": np.dtype(np.float32), "kv_cache_out": np.dtype(np.float32)}
    session = ort_session(one_node_model(body, arrays(inputs), outputs, scale=0.2))
    want = session.run(["o"], arrays(inputs))[0]
    for b in range(2):
        chosen = set(inputs["indices"][b].flatten().tolist())
        unread = [j for j in range(60) if j not in chosen]
        assert len(unread) == 36
        inputs["kv_cache"][b, 0, unread] = float("nan")
    assert np.array_equal(session.run(["o"], arrays(inputs))[0], want)
