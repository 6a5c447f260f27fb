"""capture/stitch.py：捕获整个模型的名字、结构、内存，以及在 ONNX Runtime 上等于参考实现。"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch

from deepseek_export.capture import CapturedModel, capture_model
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.checkpoint.recipe import load_array, weight_recipes
from deepseek_export.ops.table import DOMAIN
from deepseek_export.profile import resolve_profile
from deepseek_export.reference import Forms, cache_tensors, load_reference
from tests.models import TOLERANCE, model_config, ort_session

pytestmark = pytest.mark.unit

VARIANT, PROFILES = "v3-yarn", ("baseline", "mla", "moe", "mla+moe")
LAYERS = 3


class Recorded:
    """一次捕获、它报告的各步，以及期间内存的增长。"""

    def __init__(self, config, *profile) -> None:
        self.steps: list[str] = []
        process, self.growth, done = psutil.Process(), 0, threading.Event()
        before = process.memory_info().rss

        def watch() -> None:
            while not done.is_set():
                self.growth = max(self.growth, process.memory_info().rss - before)
                time.sleep(0.01)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            self.model: CapturedModel = capture_model(
                config, resolve_profile(*profile), on_step=self.steps.append
            )
        finally:
            done.set()
            thread.join()
        self.proto = self.model.proto
        self.nodes = list(self.proto.graph.node)


@pytest.fixture(scope="module")
def captured(saved):
    """方案名 → 捕获，各一次。"""
    cache: dict[str, Recorded] = {}

    def get(profile: str) -> Recorded:
        if profile not in cache:
            cache[profile] = Recorded(saved(VARIANT)[1].config, profile)
        return cache[profile]

    return get


@pytest.fixture(scope="module")
def real_v3():
    """真 DeepSeek-V3 的宽度（hidden 7168、128 头、256 专家），4 层。"""
    data = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())["V3"]
    data = {k: v for k, v in data.items() if k != "quantization_config"} | {"num_hidden_layers": 4}
    config = parse_model_config(data, "V3")
    assert (config.hidden_size, config.num_attention_heads, config.n_routed_experts) == (7168, 128, 256)
    return config, Recorded(config, "mla+moe")


def full(recorded: Recorded) -> onnx.ModelProto:
    """带函数体的完整模型。"""
    model = onnx.ModelProto()
    model.CopyFrom(recorded.proto)
    model.functions.extend(recorded.model.functions.values())
    return model


def dims_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_real_widths_need_no_weight_memory(real_v3):
    """权重合计上百 GB，捕获只增长几百 MB 以内，图里也没有权重。"""
    config, recorded = real_v3
    weights = sum(recipe.nbytes for recipe in recorded.model.weights.values())
    assert weights > 50 << 30
    assert recorded.growth < 500 << 20
    assert recorded.proto.ByteSize() < 2 << 20
    assert max(len(t.raw_data) for t in recorded.proto.graph.initializer) < 4096
    assert config.num_moe_layers == 1
    onnx.checker.check_model(full(recorded), full_check=True)
    shapes = {v.name: dims_of(v) for v in recorded.proto.graph.input}
    assert shapes["model.layers.3.mlp.experts.*.gate_proj.weight"] == [256, 2048, 7168]
    assert shapes["kv_cache.3"] == ["B", 1, "T", 576]


def test_real_weight_inputs_are_the_checkpoint_names(real_v3):
    """权重输入恰好是检查点名（专家叠放成 ``*``），次序即配方次序。"""
    config, recorded = real_v3
    recipes = weight_recipes(config, "float32")
    inputs = [v.name for v in recorded.proto.graph.input]
    assert inputs[-len(recipes) :] == list(recipes)
    assert {"model.layers.3.mlp.experts.*.down_proj.weight", "lm_head.weight"} <= set(recipes)


@pytest.mark.parametrize("profile", PROFILES)
def test_checker_and_weights(captured, profile):
    """full_check 通过；权重输入恰好是全部配方，形状一致，且都被用到。"""
    recorded = captured(profile)
    onnx.checker.check_model(full(recorded), full_check=True)
    contract = 3 + LAYERS * (1 if "mla" in profile else 2)
    weights = {v.name: tuple(dims_of(v)) for v in recorded.proto.graph.input[contract:]}
    assert weights == {name: recipe.shape for name, recipe in recorded.model.weights.items()}
    used = {name for node in recorded.nodes for name in node.input}
    assert used >= weights.keys()
    names = [t.name for t in recorded.proto.graph.initializer]
    assert len(set(names)) == len(names)
    assert not weights.keys() & set(names)


@pytest.mark.parametrize("profile", PROFILES)
def test_io_contract(captured, profile):
    """输入输出的名字与动态维度：B、S、T、L。"""
    graph = captured(profile).proto.graph
    shapes = {v.name: dims_of(v) for v in (*graph.input, *graph.output)}
    assert [v.name for v in graph.input[:3]] == ["input_ids", "past_lens", "logits_positions"]
    assert [v.name for v in graph.output[:2]] == ["logits", "hidden"]
    want = {
        "input_ids": ["B", "S"],
        "past_lens": ["B"],
        "logits_positions": ["B", "L"],
        "logits": ["B", "L", 211],
        "hidden": ["B", "S", 48],
    }
    caches = {"kv_cache": (1, 56)} if "mla" in profile else {"k_cache": (6, 40), "v_cache": (6, 20)}
    for i in range(LAYERS):
        for name, (heads, width) in caches.items():
            want |= {f"{name}{out}.{i}": ["B", heads, "T", width] for out in ("", "_out")}
    assert {
        name: dims for name, dims in shapes.items() if not name.startswith(("model.", "lm_head."))
    } == want
    assert len(graph.output) == 2 + LAYERS * len(caches)
    params = {d for v in (*graph.value_info, *graph.input) for d in dims_of(v) if isinstance(d, str)}
    assert not [d for d in params if "s" in d.replace("S", "")], "exporter 的内部符号没有换干净"


@pytest.mark.parametrize("profile", PROFILES)
def test_node_names(captured, profile):
    """节点名唯一、带模块路径；值名唯一；没有残留的调试信息。"""
    nodes = captured(profile).nodes
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    outputs = [name for node in nodes for name in node.output if name]
    assert len(set(outputs)) == len(outputs)
    prefixes = {name.rpartition("/")[0] for name in names}
    for layer in range(LAYERS):
        assert f"layers.{layer}.self_attn.q_a_proj" in prefixes
        assert f"layers.{layer}.input_layernorm" in prefixes
    assert {"layers.0.mlp.gate_proj", "layers.2.mlp.shared_experts.up_proj", "head.lm_head"} <= prefixes
    assert all(p.startswith(("embed", "layers.", "head")) for p in prefixes)
    assert not any(node.metadata_props or node.doc_string for node in nodes)


@pytest.mark.parametrize("profile", PROFILES)
def test_dsx_nodes(captured, profile):
    """每层一个 MlaAttention，每个 MoE 层一个 MoeGate 与 MoeExperts；都带插件标识；关闭时一个也没有。"""
    recorded = captured(profile)
    nodes = [node for node in recorded.nodes if node.domain == DOMAIN]
    want = Counter()
    if "mla" in profile:
        want["MlaAttention"] = LAYERS
    if "moe" in profile:
        want |= Counter(MoeGate=LAYERS - 1, MoeExperts=LAYERS - 1)
    assert Counter(node.op_type for node in nodes) == want
    assert set(recorded.model.functions) == set(want)
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"dsx"
        assert attributes["plugin_version"] == b"1"
    sites = [(s.op, s.inputs, s.outputs) for s in recorded.model.sites]
    assert sites == [(n.op_type, tuple(n.input), tuple(n.output)) for n in nodes]
    assert Counter(s.layer for s in recorded.model.sites) == Counter(
        layer for layer in range(LAYERS) for op in want if op == "MlaAttention" or layer >= 1
    )
    opsets = {o.domain for o in recorded.proto.opset_import}
    assert opsets == ({"", DOMAIN} if want else {""})


def test_trace_count_does_not_grow_with_depth(captured):
    """层数翻倍：追踪的块一个不多，节点数线性增长。"""
    shallow = captured("baseline")
    deep = Recorded(model_config(VARIANT, num_hidden_layers=2 * LAYERS), "baseline")
    assert deep.steps == shallow.steps
    assert sorted(shallow.steps) == ["dense layer", "embed", "head", "moe layer", "stitch"]

    def per_layer(recorded: Recorded) -> Counter:
        return Counter(
            node.name.split("/")[0].split(".")[1]
            for node in recorded.nodes
            if node.name.startswith("layers.")
        )

    few, many = per_layer(shallow), per_layer(deep)
    assert many["0"] == few["0"]
    assert {many[str(i)] for i in range(1, 2 * LAYERS)} == {few["1"]}
    assert len(deep.nodes) - len(shallow.nodes) == LAYERS * few["1"]


def test_off_is_byte_identical_whatever_else_is_set(captured):
    """MLA、MoE 关闭时，MTP 打开与否都得到逐字节相同的主干：MTP 只在末尾加一个草稿验证节点。"""
    settings = ["mtp.num_draft_tokens=3", "mtp.verify=rejection"]
    graph = Recorded(model_config(VARIANT), "mtp", settings).proto.graph
    baseline = captured("baseline").proto.graph
    *trunk, verification = graph.node
    assert verification.op_type == "SpecAcceptRejection"
    assert [n.SerializeToString(deterministic=True) for n in trunk] == [
        n.SerializeToString(deterministic=True) for n in baseline.node
    ]
    assert list(graph.initializer) == list(baseline.initializer)


@pytest.mark.parametrize("profile", PROFILES)
def test_equals_the_reference_on_onnx_runtime(saved, captured, profile):
    """不等长的两行先 prefill 再 decode，logits、hidden、缓存都等于参考实现。"""
    checkpoint, recorded = saved(VARIANT)[1], captured(profile)
    session = ort_session(full(recorded))
    weights = {n: load_array(n, r, checkpoint.store) for n, r in recorded.model.weights.items()}
    forms = Forms.for_reference(resolve_profile(profile))
    model = load_reference(checkpoint, forms)
    found = cache_tensors(checkpoint.config, forms, torch.float32, torch.float32, 0)
    names = [tensor.name for tensor in found]
    caches = model.empty_caches(2, 96)
    feeds = {
        f"{n}.{i}": t.numpy() for i, layer in enumerate(caches) for n, t in zip(names, layer, strict=True)
    }
    outputs = [o.name for o in session.get_outputs()]
    g = torch.Generator().manual_seed(3)
    for S, past, positions in ((80, [0, 0], [[79], [4]]), (1, [80, 5], [[0], [0]]), (5, [81, 6], [[4], [0]])):
        ids = torch.randint(0, 211, (2, S), generator=g)
        step = {
            "input_ids": ids,
            "past_lens": torch.tensor(past),
            "logits_positions": torch.tensor(positions),
        }
        got = dict(
            zip(
                outputs,
                session.run(None, {k: v.numpy() for k, v in step.items()} | feeds | weights),
                strict=True,
            )
        )
        logits, hidden, caches = model(*step.values(), caches)
        feeds = {k.replace("_out.", "."): v for k, v in got.items() if "cache" in k}
        assert np.abs(got["logits"] - logits.numpy()).max() < TOLERANCE[torch.float32]
        # 右侧填充的行也要相同：它们是确定的，只是之后不被读到。
        assert np.abs(got["hidden"] - hidden.numpy()).max() < TOLERANCE[torch.float32]
        for i, layer in enumerate(caches):
            for name, tensor in zip(names, layer, strict=True):
                assert np.abs(feeds[f"{name}.{i}"] - tensor.numpy()).max() < TOLERANCE[torch.float32]
