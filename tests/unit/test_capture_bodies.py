"""capture/bodies.py：函数体在 ONNX Runtime 与 onnx 参考求值器上都等于 eager。"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from deepseek_export.capture.bodies import gate_attributes
from deepseek_export.ops.int8_cache import encode_rows
from deepseek_export.ops.mla_attention import mla_attention, prefers_naive
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import OPS
from deepseek_export.reference.weights import by_torch
from tests.models import ODD, TOLERANCE, distance, model_config, one_node_model, ort_session

pytestmark = pytest.mark.unit

DTYPES = [torch.float32, torch.float16]
H, DN, DR, DV, R = (
    ODD[key]
    for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
)
E, D, INNER, K = (
    ODD[key] for key in ("n_routed_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")
)
SCALE = (DN + DR) ** -0.5

#: (B, S, T, past_lens)：空缓存、填满、解码、长 prefill，``auto`` 的两边都有。
MLA_SHAPES = [
    (1, 1, 1, [0]),
    (1, 1, 9, [0]),
    (2, 1, 9, [8, 3]),
    (1, 5, 5, [0]),
    (2, 5, 17, [0, 12]),
    (2, 16, 16, [0, 0]),
    (3, 4, 6, [2, 0, 1]),
]


def mla_inputs(B, S, T, past, dtype, cache_dtype=None):
    g = torch.Generator().manual_seed(B * 100 + S * 10 + T)

    def rand(*shape, spread=1.0):
        return (torch.randn(shape, generator=g) * spread).to(dtype)

    return {
        "q_nope": rand(B, S, H, DN),
        "q_pe": rand(B, S, H, DR),
        "c_kv": rand(B, S, R),
        "k_pe": rand(B, S, DR),
        "kv_cache": encode_rows(rand(B, 1, T, R), rand(B, 1, T, DR))
        if cache_dtype == torch.int8
        else rand(B, 1, T, R + DR).to(cache_dtype or dtype),
        "past_lens": torch.tensor(past),
        "w_kv_b": rand(H * (DN + DV), R, spread=R**-0.5),
    }


def arrays(inputs):
    return {name: t.numpy() for name, t in inputs.items()}


def both_runtimes(model: onnx.ModelProto):
    """先过 checker，再给出 ORT 与 onnx 参考求值器两种跑法。"""
    onnx.checker.check_model(model, full_check=True)
    session, evaluator = ort_session(model), ReferenceEvaluator(model)
    return {"ort": lambda feeds: session.run(None, feeds), "onnx": lambda feeds: evaluator.run(None, feeds)}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("form", ["absorb", "naive", "auto"])
def test_mla_body(bodies, form, dtype):
    """同一个函数体跑各种形状，输出与缓存都等于 eager 的同一种形式。"""
    kind = by_torch(dtype).numpy
    feeds = arrays(mla_inputs(*MLA_SHAPES[0], dtype))
    model = one_node_model(
        bodies("mla", form, dtype, dtype), feeds, {"o": kind, "kv_cache_out": kind}, scale=SCALE
    )
    runners = both_runtimes(model)
    for B, S, T, past in MLA_SHAPES:
        inputs = mla_inputs(B, S, T, past, dtype)
        o, cache = mla_attention(*inputs.values(), SCALE, form=form)
        for name, run in runners.items():
            got_o, got_cache = run(arrays(inputs))
            assert (got_o.dtype, got_cache.dtype) == (kind, kind)
            assert distance(got_o, o) < TOLERANCE[dtype], (name, B, S, T)
            assert np.array_equal(got_cache, cache.numpy()), (name, B, S, T)


def test_mla_body_scale_is_the_node_attribute(bodies):
    """scale 来自节点属性，不是固化在函数体里的。"""
    inputs = mla_inputs(2, 5, 17, [0, 12], torch.float32)
    for scale in (0.01, 1.5):
        model = one_node_model(
            bodies("mla", "auto", torch.float32, torch.float32),
            arrays(inputs),
            {"o": np.float32, "kv_cache_out": np.float32},
            scale=scale,
        )
        got = ort_session(model).run(["o"], arrays(inputs))[0]
        assert distance(got, mla_attention(*inputs.values(), scale)[0]) < TOLERANCE[torch.float32]


def test_mla_body_with_narrow_cache(bodies):
    """缓存 float16、计算 float32。"""
    inputs = mla_inputs(2, 5, 17, [0, 12], torch.float32, torch.float16)
    function = bodies("mla", "auto", torch.float32, torch.float16)
    model = one_node_model(
        function, arrays(inputs), {"o": np.float32, "kv_cache_out": np.float16}, scale=SCALE
    )
    o, cache = mla_attention(*inputs.values(), SCALE)
    for run in both_runtimes(model).values():
        got_o, got_cache = run(arrays(inputs))
        assert distance(got_o, o) < TOLERANCE[torch.float32]
        assert np.array_equal(got_cache, cache.numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
def test_mla_body_with_int8_cache(bodies, dtype):
    """MLA-7：写进 int8 缓存的字节逐位相同，输出等于 eager。"""
    kind, start = by_torch(dtype).numpy, mla_inputs(*MLA_SHAPES[0], dtype, torch.int8)
    function = bodies("mla", "auto", dtype, torch.int8)
    model = one_node_model(function, arrays(start), {"o": kind, "kv_cache_out": np.int8}, scale=SCALE)
    runners = both_runtimes(model)
    for B, S, T, past in MLA_SHAPES:
        inputs = mla_inputs(B, S, T, past, dtype, torch.int8)
        o, cache = mla_attention(*inputs.values(), SCALE)
        for name, run in runners.items():
            got_o, got_cache = run(arrays(inputs))
            assert distance(got_o, o) < TOLERANCE[dtype], (name, B, S, T)
            assert np.array_equal(got_cache, cache.numpy()), (name, B, S, T)


def test_auto_condition_in_the_graph(bodies):
    """图里 If 的条件就是 prefers_naive，两边都取到。"""
    function = bodies("mla", "auto", torch.float32, torch.float32)
    index = next(i for i, node in enumerate(function.node) if node.op_type == "If")
    condition = function.node[index].input[0]
    needed, nodes = {condition}, []
    for node in reversed(function.node[:index]):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    shapes = {"q_nope": ["B", "S", H, DN], "kv_cache": ["B", 1, "T", R + DR]}
    graph = helper.make_graph(
        nodes,
        "condition",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in shapes.items()],
        [helper.make_tensor_value_info(condition, onnx.TensorProto.BOOL, [])],
    )
    session = ort_session(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    )
    seen = set()
    for S, T in [(s, t) for _, s, t, _ in MLA_SHAPES] + [(3, 100), (50, 100), (100, 100)]:
        q, cache = np.zeros((1, S, H, DN), np.float32), np.zeros((1, 1, T, R + DR), np.float32)
        got = bool(session.run(None, {"q_nope": q, "kv_cache": cache})[0])
        assert got == prefers_naive(S, T, DN, DV, R), (S, T)
        seen.add(got)
    assert seen == {True, False}
    assert {prefers_naive(s, t, DN, DV, R) for _, s, t, _ in MLA_SHAPES} == {True, False}


@pytest.mark.parametrize("variant", ["v3", "v3-no-norm-topk", "v2-greedy", "v2-group"])
def test_gate_body(bodies, variant):
    """专家（含次序与并列）逐个相同，权重相符。"""
    attributes = gate_attributes(model_config(variant))
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(E, generator=g) if variant.startswith("v3") else torch.zeros(E)
    logits = torch.randn(40, E, generator=g) * 2
    logits[20:] = logits[20:].round()  # 并列
    logits[-1] = 0
    feeds = {"logits": logits.numpy(), "bias": bias.numpy()}
    kinds = {"topk_ids": np.int32, "topk_weights": np.float32}
    model = one_node_model(bodies("gate", variant), feeds, kinds, **attributes)
    for run in both_runtimes(model).values():
        for rows in (slice(0, 40), slice(0, 20), slice(39, 40)):
            ids, weights = moe_gate(logits[rows], bias, **attributes)
            got_ids, got_weights = run({"logits": logits[rows].numpy(), "bias": bias.numpy()})
            assert (got_ids.dtype, got_weights.dtype) == (np.int32, np.float32)
            # round 之后并列是逐位相等的分数，各实现的 sigmoid/softmax 对相等输入给出相等输出。
            assert np.array_equal(got_ids, ids.numpy())
            assert distance(got_weights, weights) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
def test_experts_body(bodies, dtype):
    """同一个函数体：多个 token、一个 token、只有一个专家、没有 token。"""
    g = torch.Generator().manual_seed(0)
    shapes = ((E, INNER, D), (E, INNER, D), (E, D, INNER))
    weights = [(torch.randn(s, generator=g) * s[-1] ** -0.5).to(dtype) for s in shapes]
    cases = {
        "many": torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(9)]),
        "one token": torch.tensor([[3, 1, 11, 0]]),
        "one expert": torch.full((3, K), 5),
        "none": torch.zeros(0, K),
    }
    runners = None
    for name, ids in cases.items():
        x = torch.randn(len(ids), D, generator=g).to(dtype)
        inputs = (x, ids.to(torch.int32), torch.rand(len(ids), K, generator=g), *weights)
        feeds = {port.name: t.numpy() for port, t in zip(OPS["MoeExperts"].inputs, inputs, strict=True)}
        if runners is None:
            runners = both_runtimes(
                one_node_model(bodies("experts", dtype), feeds, {"y": by_torch(dtype).numpy})
            )
        for runtime, run in runners.items():
            got = run(feeds)[0]
            assert got.dtype == by_torch(dtype).numpy
            assert distance(got, moe_experts(*inputs)) < TOLERANCE[dtype], (name, runtime)


def test_bodies_follow_the_table(bodies):
    """函数体的名字、输入输出次序、属性与契约表一致，节点名不重复。"""
    functions = [
        bodies("mla", "auto", torch.float32, torch.float32),
        bodies("gate", "v3"),
        bodies("experts", torch.float32),
    ]
    for function in functions:
        spec = OPS[function.name]
        assert list(function.input) == [port.name for port in spec.inputs]
        assert list(function.output) == [port.name for port in spec.outputs]
        assert list(function.attribute) == [a.name for a in spec.attributes] + [
            "plugin_namespace",
            "plugin_version",
        ]
        named = [node.name for node in function.node if node.name]
        assert len(set(named)) == len(named)
        assert all(node.domain == "" for node in function.node)
