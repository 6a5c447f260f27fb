"""TensorRT 的下沉：结果不变、每处各有什么节点、名字带模块路径、拒绝什么。"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from deepseek_export.capture import capture_model
from deepseek_export.capture.bodies import latent_attention_body
from deepseek_export.checkpoint.recipe import load_array
from deepseek_export.engine.graph import KEY_SPAN, give_best, take_key_span
from deepseek_export.errors import DsxError
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.table import LATENT_ATTENTION
from deepseek_export.passes import GraphModule, lower
from deepseek_export.passes.inline_bodies import InlineMoeGatePass
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS, LowerMlaToTensorrtPass
from deepseek_export.profile import resolve_profile
from deepseek_export.reference.weights import by_torch
from tests.models import TOLERANCE, distance, model_config, one_node_model, ort_session

pytestmark = pytest.mark.unit

SCALE = 0.2


@functools.cache
def captured(variant: str):
    return capture_model(model_config(variant), resolve_profile("mla+moe"))


def module_of(form: str = "auto") -> GraphModule:
    return GraphModule.from_captured(captured("v3"), model_config("v3"), "float32", form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latent_attention_body_equals_the_reference(dtype):
    """TRT-2：函数体与 eager 一致：空缓存、长度不等；query 为空（走 prefill 路径时）得到空的结果。"""
    c = model_config("v3")
    body = latent_attention_body(c, dtype, dtype)
    rng = np.random.default_rng(0)
    H, r, width = c.num_attention_heads, c.kv_lora_rank, c.latent_cache_values
    number = by_torch(dtype).numpy
    session = None
    for B, S, T, past in ((1, 1, 8, (0,)), (2, 8, 40, (0, 31)), (3, 0, 16, (1, 2, 3))):
        feeds = {
            "q": rng.standard_normal((B, S, H, width)).astype(number),
            "kv_cache": rng.standard_normal((B, 1, T, width)).astype(number),
            "past_lens": np.array(past, np.int64),
        }
        if session is None:
            model = one_node_model(body, feeds, {"context": number}, scale=SCALE, kv_lora_rank=r)
            session = ort_session(model)
        (got,) = session.run(None, feeds)
        if S == 0:
            assert got.shape == (H, 0, r)
            continue
        want = latent_attention(*map(torch.from_numpy, feeds.values()), SCALE, r)
        assert distance(got, want) < TOLERANCE[dtype]


def test_whole_model_is_equal_on_both_sides_of_the_split(saved):
    """TRT-2：下沉之后的图在 ONNX Runtime 上与 portable 相等，S 在分界两侧都比，长度不等；prefill 时缓存里没有写过的行是 NaN 也一样。"""
    config, store = model_config("v3"), saved("v3")[1].store
    models = [
        lower(captured("v3"), config, resolve_profile("mla+moe"), "float32", target)
        for target in ("portable", "tensorrt-rtx")
    ]
    weights = {name: load_array(name, recipe, store) for name, recipe in models[0].weights.items()}
    assert models[0].weights == models[1].weights
    rng = np.random.default_rng(1)
    shape = (2, 1, 64, config.latent_cache_values)
    for S in (1, MAX_DECODE_TOKENS, MAX_DECODE_TOKENS + 1, 30):
        feeds = {
            "input_ids": rng.integers(0, config.vocab_size, (2, S)),
            "past_lens": np.array([0, 17], np.int64),
            "logits_positions": np.broadcast_to(np.arange(S), (2, S)).copy(),
            **weights,
        }
        for layer in range(config.num_hidden_layers):
            feeds[f"kv_cache.{layer}"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
        want, got = (ort_session(model.proto).run(None, feeds) for model in models)
        assert max(map(distance, got, want)) < TOLERANCE[torch.float32]
        if S <= MAX_DECODE_TOKENS:
            continue  # 解码的插件核不读没有写过的行（KERNEL-2），这里跑的是它的函数体
        for layer in range(config.num_hidden_layers):
            for row, past in enumerate(feeds["past_lens"]):
                feeds[f"kv_cache.{layer}"][row, :, past + S :] = np.nan
        logits = ort_session(models[1].proto).run(["logits"], feeds)[0]
        assert np.array_equal(logits, got[0])


def written_bytes(model, feeds, tmp_path):
    """每个节点写出几个字节，与 logits；字节数由 ONNX Runtime 的剖析得出；缓存写入不算，它的输出就是整个缓存，解码的插件核（这里是函数体，没有 query）也不算。"""
    session = ort_session(model, profile=tmp_path / "profile")
    (logits,) = session.run(["logits"], feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = Counter()
    for event in events:
        args = event.get("args", {})
        outside = args.get("op_name") == "TensorScatter" or LATENT_ATTENTION.name in event["name"]
        if "output_size" in args and not outside:
            found[event["name"]] += int(args["output_size"])
    return dict(found), logits


@pytest.mark.parametrize("form", ["auto", "naive"])
def test_prefill_follows_the_length_not_the_capacity(form, saved, tmp_path):
    """TRT-15：容量从 64 到 4096，一个节点也不多写一个字节；展开的、注意力的中间值只有 max(past_lens) + S 行。交给 TensorRT 的那张图由
    ``key_span`` 的列数决定，列数够就结果相同。"""
    config, store = model_config("v3"), saved("v3")[1].store
    profile = resolve_profile("mla", [f"mla.form={form}"])
    traced = capture_model(config, profile)
    lowered = lower(traced, config, profile, "float32", "tensorrt-rtx")
    weights = {name: load_array(name, recipe, store) for name, recipe in lowered.weights.items()}
    rng = np.random.default_rng(4)
    S, past = 12, np.array([0, 17], np.int64)
    feeds = {
        "input_ids": rng.integers(0, config.vocab_size, (2, S)),
        "past_lens": past,
        "logits_positions": np.full((2, 1), S - 1),
        **weights,
    }
    engine = onnx.ModelProto()
    engine.CopyFrom(lowered.proto)
    assert take_key_span(engine)
    assert engine.graph.input[-1].name == KEY_SPAN
    assert not any(node.op_type == "ReduceMax" and "mla" in node.name for node in engine.graph.node)
    H, layers = config.num_attention_heads, config.num_hidden_layers
    row = H * (config.qk_nope_head_dim + config.v_head_dim) * 4
    prefix = (0.3 * rng.standard_normal((layers, 2, 1, 64, config.latent_cache_values))).astype(np.float32)
    logits, written = [], []
    for T in (64, 4096):
        for layer in range(layers):
            cache = np.full((2, 1, T, config.latent_cache_values), np.nan, np.float32)
            cache[:, :, :64] = prefix[layer]
            feeds[f"kv_cache.{layer}"] = cache
        runs = [written_bytes(lowered.proto, feeds, tmp_path)]
        span = {KEY_SPAN: np.zeros((2, 40), np.int8)}
        runs.append(written_bytes(engine, feeds | span, tmp_path))
        for (found, answer), P in zip(runs, (17 + S, 40), strict=True):
            assert [size for name, size in found.items() if "mla/expand" in name] == [2 * P * row] * layers
            logits.append(answer)
        written.append(runs[0][0])
    assert written[0] == written[1]
    assert not np.isnan(logits[0]).any()
    assert max(distance(one, logits[0]) for one in logits) < TOLERANCE[torch.float32]


def test_the_best_of_the_logits():
    """TRT-16：引擎的图另给出最大的 token 与它的 logit：并列取较小的，-inf 照算，有 NaN 的给出无穷大；草稿模型不加。"""
    value = helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["B", "L", 5])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B", "L", 5])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["logits"])], "g", [given], [value])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    assert give_best(model)
    rows = [
        [1, 4, 2, 4, 3],
        [-np.inf, -3, -np.inf, -9, -3],
        [1, np.nan, 2, 7, 3],
        [-np.inf] * 5,
        [np.inf, 1, 2, 3, 4],
    ]
    _, ids, peaks = ort_session(model).run(None, {"x": np.array([rows], np.float16)})
    assert (ids.dtype, peaks.dtype) == (np.int64, np.float32)
    assert [ids[0, row, 0] for row in (0, 1, 4)] == [1, 1, 0]
    assert peaks[0, :, 0].tolist() == [4, -3, np.inf, -np.inf, np.inf]
    draft = helper.make_tensor_value_info("draft_id", TensorProto.INT64, ["B"])
    model.graph.output.append(draft)
    assert not give_best(model)


def test_graphs_without_prefill_take_no_span():
    """TRT-15：``absorb`` 没有 prefill 路径，图不变。"""
    module = module_of("absorb")
    LowerMlaToTensorrtPass()(module)
    model = module.to_proto()
    before = model.SerializeToString(deterministic=True)
    assert not take_key_span(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("form", "present"),
    [
        ("auto", {"TensorScatter", "LatentAttention", "Attention"}),
        ("absorb", {"TensorScatter", "LatentAttention"}),
        ("naive", {"TensorScatter", "Attention"}),
    ],
)
def test_each_form_emits_its_own_path(form, present):
    """TRT-1：每层一次缓存写入；解码路径一个插件核，prefill 路径一个原生注意力，auto 两条都有。"""
    module = module_of(form)
    result = LowerMlaToTensorrtPass()(module)
    layers = module.config.num_hidden_layers
    assert (result.changed, result.count) == (True, layers)
    counts = Counter(node.op for node in module.graph.nodes)
    assert {op: counts[op] for op in ("TensorScatter", "LatentAttention", "Attention")} == {
        op: layers if op in present else 0 for op in ("TensorScatter", "LatentAttention", "Attention")
    }
    assert ("LatentAttention" in module.functions) == ("LatentAttention" in present)
    again = LowerMlaToTensorrtPass()(module)
    assert (again.changed, again.count) == (False, 0)


def test_native_attention_is_padded_to_one_width():
    """TRT-1：V 补零到与 Q、K 同宽（8 的倍数），结果切回 v_head_dim。"""
    module = module_of()
    LowerMlaToTensorrtPass()(module)
    c = module.config
    pads = {n.name.rpartition("/")[2]: int(n.inputs[1].values[-1]) for n in module.find("Pad", domain="")}
    assert pads == {"v_padded": c.qk_head_dim - c.v_head_dim}
    assert c.qk_head_dim % 8 == 0


def test_too_wide_heads_are_refused_unless_absorbed():
    wide = {"qk_nope_head_dim": 250}
    for form in ("auto", "naive"):
        module = module_of(form)
        module.config = dataclasses.replace(module.config, **wide)
        with pytest.raises(DsxError, match="= 266") as caught:
            LowerMlaToTensorrtPass()(module)
        assert caught.value.code == "DSX-E320"
    module = module_of("absorb")
    module.config = dataclasses.replace(module.config, **wide)
    assert LowerMlaToTensorrtPass()(module).count == module.config.num_hidden_layers


def test_inlined_router_keeps_the_module_path():
    """每层的 router 节点都带自己的模块路径，两层之间没有同名的值。"""
    module = module_of()
    before = module.find("MoeGate")
    ports = [[t.name for t in (*node.inputs, *node.outputs)] for node in before]
    result = InlineMoeGatePass()(module)
    assert (result.changed, result.count) == (True, module.config.num_moe_layers)
    names = [node.name for node in module.graph.nodes]
    assert len(names) == len(set(names))
    for layer in (1, 2):
        assert any(name.startswith(f"layers.{layer}.mlp/MoeGate/gate/TopK") for name in names)
    values = {t.name for node in module.graph.nodes for t in (*node.inputs, *node.outputs)}
    assert {name for group in ports for name in group} <= values
    again = InlineMoeGatePass()(module)
    assert (again.changed, again.count) == (False, 0)
