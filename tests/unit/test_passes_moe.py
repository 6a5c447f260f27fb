"""两个 MoE 下沉 pass：匹配、不匹配、拒绝、幂等、计数、名字、数值。"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from deepseek_export.capture.bodies import gate_attributes, moe_experts_body, moe_gate_body
from deepseek_export.checkpoint.recipe import weight_recipes
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import DOMAIN, OPSET_VERSION
from deepseek_export.ort_kernels import OrtKernels, installed_kernels
from deepseek_export.passes.base import MICROSOFT, GraphModule
from deepseek_export.passes.lower_experts_to_ort_moe import LowerExpertsToOrtMoePass
from deepseek_export.passes.lower_gate_experts_to_ort_moe import LowerGateExpertsToOrtMoePass
from deepseek_export.reference.weights import torch_dtype
from tests.models import TOLERANCE, distance, model_config, ort_session

pytestmark = pytest.mark.unit

PLUGIN = {"plugin_namespace": "dsx", "plugin_version": "1"}
MLP = "model.layers.1.mlp"
WEIGHTS = [f"{MLP}.experts.*.{w}_proj.weight" for w in ("gate", "up", "down")]
BIAS = f"{MLP}.gate.e_score_correction_bias"
PASSES = (LowerGateExpertsToOrtMoePass, LowerExpertsToOrtMoePass)


def moe_module(variant="v3", dtype="float32", extra=(), outputs=("y",), **overrides) -> GraphModule:
    """最小的图：logits、x、bias 和专家权重是输入，``y`` 是输出。"""
    config = model_config(variant, **overrides)
    recipes = {
        name: recipe for name, recipe in weight_recipes(config, dtype).items() if name in (*WEIGHTS, BIAS)
    }
    N, D, E, k = "N", config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    T = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT
    info = helper.make_tensor_value_info
    gate = helper.make_node(
        "MoeGate",
        ["l", BIAS],
        ["ids", "w"],
        "layers.1.mlp/MoeGate_0",
        domain=DOMAIN,
        **PLUGIN,
        **gate_attributes(config),
    )
    experts = helper.make_node(
        "MoeExperts", ["x", "ids", "w", *WEIGHTS], ["y"], "layers.1.mlp/MoeExperts_1", domain=DOMAIN, **PLUGIN
    )
    values = {
        "y": info("y", T, [N, D]),
        "ids": info("ids", onnx.TensorProto.INT32, [N, k]),
        "w": info("w", onnx.TensorProto.FLOAT, [N, k]),
        "w2": info("w2", onnx.TensorProto.FLOAT, [N, k]),
    }
    inputs = [info("l", onnx.TensorProto.FLOAT, [N, E]), info("x", T, [N, D])]
    inputs += [
        info(name, onnx.TensorProto.FLOAT if recipe.dtype == "float32" else T, recipe.shape)
        for name, recipe in recipes.items()
    ]
    graph = helper.make_graph(
        [gate, experts, *extra],
        "moe",
        inputs,
        [values[name] for name in outputs],
        value_info=[value for name, value in values.items() if name not in outputs],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    functions = {"MoeGate": _gate_body(config), "MoeExperts": _experts_body(config, torch_dtype(dtype))}
    return GraphModule(gs.import_onnx(proto), functions, recipes, dtype, config, (), "main", (), None)


#: 追踪一次要几百毫秒，同样的配置只追踪一次；ModelConfig 与 dtype 都可哈希。
_gate_body, _experts_body = functools.cache(moe_gate_body), functools.cache(moe_experts_body)


def feeds_for(module: GraphModule, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """随机输入；融合后的权重由原来的三个算出。"""
    rng = np.random.default_rng(seed)
    config = module.config
    E, inner, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    feeds = {
        "l": rng.standard_normal((rows, E)),
        "x": rng.standard_normal((rows, D)),
        BIAS: rng.standard_normal(E) * (0.7 if config.family == "deepseek_v3" else 0),
        WEIGHTS[0]: rng.standard_normal((E, inner, D)) * D**-0.5,
        WEIGHTS[1]: rng.standard_normal((E, inner, D)) * D**-0.5,
        WEIGHTS[2]: rng.standard_normal((E, D, inner)) * inner**-0.5,
    }
    pair = np.stack([feeds[WEIGHTS[0]], feeds[WEIGHTS[1]]], axis=2).reshape(E, 2 * inner, D)
    feeds[f"{MLP}.experts.*.gate_up_proj.weight"] = pair
    return {name: array.astype(np.float32) for name, array in feeds.items()}


def run(module: GraphModule, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort_session(module.to_proto())
    return session.run(["y"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def ops(module: GraphModule) -> list[str]:
    return [node.op for node in module.graph.nodes]


def without(*names: str) -> OrtKernels:
    kernels = installed_kernels()
    return dataclasses.replace(
        kernels,
        version="1.20.0",
        attributes={op: a for op, a in kernels.attributes.items() if op not in names},
    )


@pytest.mark.parametrize("rows", [0, 1, 5, 700])
@pytest.mark.parametrize(
    ("variant", "changes", "counts"),
    [
        ("v3", {}, (1, 0)),
        ("v3", {"num_experts_per_tok": 1}, (1, 0)),
        (
            "v3-one-group",
            {"n_routed_experts": 7, "moe_intermediate_size": 13, "num_experts_per_tok": 7},
            (1, 0),
        ),
        ("v3-no-norm-topk", {}, (0, 1)),
        ("v2-greedy", {}, (0, 1)),
        ("v2-greedy", {"num_experts_per_tok": 1}, (0, 1)),
        ("v2-group", {}, (0, 1)),
        ("v2-lite", {}, (0, 1)),
    ],
)
def test_lowering_keeps_the_numbers(variant, changes, counts, rows):
    module = moe_module(variant, **changes)
    feeds = feeds_for(module, rows)
    want = run(module, feeds)
    got = tuple(build()(module).count for build in PASSES)
    assert got == counts
    assert "MoeExperts" not in ops(module)
    assert distance(run(module, feeds), want) < TOLERANCE[torch.float32]


def test_fused_pair_has_the_promised_nodes_and_names():
    module = moe_module("v3")
    result = LowerGateExpertsToOrtMoePass()(module)
    assert (result.changed, result.count, result.refused) == (True, 1, ())
    router, moe, scale = module.graph.nodes
    assert [router.op, moe.op, scale.op] == ["MoEGroupRouter", "MoE", "Mul"]
    assert [n.name for n in module.graph.nodes] == [
        f"layers.1.mlp/{n}" for n in ("MoEGroupRouter", "MoE", "MoE_scale")
    ]
    assert [router.inputs[0].name, moe.inputs[0].name, scale.outputs[0].name] == ["l", "x", "y"]
    assert router.attrs["group_topk"] == 2
    assert router.attrs["top_k"] == moe.attrs["k"] == 4
    # 再导出时 gate、up 与两个函数体都不见了，新权重顶在 gate 的位置。
    proto = module.to_proto()
    assert not proto.functions
    assert [o.domain for o in proto.opset_import] == ["", MICROSOFT]
    fused, recipe = list(module.weights.items())[-2]
    assert fused == f"{MLP}.experts.*.gate_up_proj.weight"
    assert (recipe.op, recipe.shape) == ("stack_swiglu", (12, 56, 48))
    assert recipe.sources[:3] == tuple(f"{MLP}.experts.{e}_proj.weight" for e in ("0.gate", "0.up", "1.gate"))
    assert [i.name for i in proto.graph.input] == ["l", "x", *module.weights]


def test_second_pass_keeps_gate_and_all_site_names():
    module = moe_module("v2-greedy")
    assert LowerExpertsToOrtMoePass()(module).count == 1
    gate = module.find("MoeGate")[0]
    assert [t.name for t in (*gate.inputs, *gate.outputs)] == ["l", BIAS, "ids", "w"]
    assert [t.name for t in module.graph.outputs] == ["y"]
    assert [f.name for f in module.to_proto().functions] == ["MoeGate"]
    onnx.checker.check_model(module.to_proto())


@pytest.mark.parametrize("build", PASSES)
@pytest.mark.parametrize("variant", ["v3", "v2-greedy"])
def test_running_twice_changes_nothing_more(build, variant):
    module = moe_module(variant)
    build()(module)
    before = module.to_proto().SerializeToString()
    again = build()(module)
    assert (again.changed, again.count) == (False, 0)
    assert module.to_proto().SerializeToString() == before


@pytest.mark.parametrize("build", PASSES)
def test_graph_without_experts_is_left_alone(build):
    module = moe_module("v3")
    (experts,) = module.find("MoeExperts")
    experts.op, experts.domain = "Other", ""
    result = build()(module)
    assert (result.changed, result.count, result.refused) == (False, 0, ())


def extra_user(name: str):
    return helper.make_node("Identity", [name], ["w2"], f"user_of_{name}")


@pytest.mark.parametrize(
    ("build", "arguments", "reason", "value"),
    [
        (
            LowerGateExpertsToOrtMoePass,
            {"variant": "v2-greedy"},
            "scoring_func = sigmoid",
            "scoring_func = softmax",
        ),
        (
            LowerGateExpertsToOrtMoePass,
            {"variant": "v3-no-norm-topk"},
            "norm_topk_prob = 1",
            "norm_topk_prob = 0",
        ),
        (LowerGateExpertsToOrtMoePass, {"extra": (extra_user("w"),)}, "w 还有别的消费者", "user_of_w"),
        (LowerGateExpertsToOrtMoePass, {"outputs": ("y", "ids")}, "ids 是图的输出", "ids"),
        (LowerGateExpertsToOrtMoePass, {"dtype": "float16"}, "只有 float32 kernel", "x 的 dtype = float16"),
        (LowerExpertsToOrtMoePass, {"dtype": "float16"}, "只有 float32 kernel", "x 的 dtype = float16"),
    ],
)
def test_refusals_say_why_and_on_what(build, arguments, reason, value):
    module = moe_module(**arguments)
    before = ops(module)
    result = build()(module)
    (refusal,) = result.refused
    assert (result.changed, result.count, refusal.node) == (False, 0, "layers.1.mlp/MoeExperts_1")
    assert reason in refusal.reason
    assert value in refusal.value
    assert ops(module) == before


def test_refusal_when_ids_come_from_elsewhere():
    module = moe_module("v3")
    (experts,) = module.find("MoeExperts")
    ids, (gate,) = experts.inputs[1], module.find("MoeGate")
    gate.op = "OtherGate"
    assert "来自 OtherGate" in LowerGateExpertsToOrtMoePass()(module).refused[0].value
    gate.op = "MoeGate"
    ids.inputs.clear()
    assert "图的输入" in LowerGateExpertsToOrtMoePass()(module).refused[0].value


def test_refusal_when_ids_and_weights_are_not_a_pair():
    module = moe_module("v3", extra=(extra_user("w"),))
    (experts,) = module.find("MoeExperts")
    experts.inputs[2] = module.graph.nodes[2].outputs[0]
    assert "同一个 MoeGate" in LowerGateExpertsToOrtMoePass()(module).refused[0].reason
    # 第二个 pass 不问它们从哪里来。
    assert LowerExpertsToOrtMoePass()(module).count == 1


@pytest.mark.parametrize("build", PASSES)
def test_refusal_when_weights_are_not_stacked(build):
    module = moe_module("v3")
    module.weights[WEIGHTS[2]] = module.weights[WEIGHTS[2]].model_copy(update={"op": "copy"})
    refusal = build()(module).refused[0]
    assert "w_down" in refusal.reason
    assert refusal.value.endswith("= copy")


def test_refusal_when_fused_weight_cannot_be_named():
    module = moe_module("v3")
    recipe = module.weights.pop(WEIGHTS[0])
    next(t for t in module.graph.inputs if t.name == WEIGHTS[0]).name = "renamed"
    module.weights["renamed"] = recipe
    assert LowerExpertsToOrtMoePass()(module).refused[0].value == "renamed"


def test_old_onnxruntime_without_router_falls_to_the_second_pass():
    module = moe_module("v3")
    feeds = feeds_for(module, 9)
    want = run(module, feeds)
    kernels = without("MoEGroupRouter")
    refusal = LowerGateExpertsToOrtMoePass(kernels)(module).refused[0]
    assert "没有 MoEGroupRouter" in refusal.reason
    assert refusal.value == "onnxruntime = 1.20.0"
    assert LowerExpertsToOrtMoePass(kernels)(module).count == 1
    assert distance(run(module, feeds), want) < TOLERANCE[torch.float32]


def test_onnxruntime_whose_moe_lacks_swiglu_is_refused():
    kernels = installed_kernels()
    narrow = {**kernels.attributes, "MoE": kernels.attributes["MoE"] - {"swiglu_fusion", "activation_alpha"}}
    result = LowerExpertsToOrtMoePass(dataclasses.replace(kernels, attributes=narrow))(moe_module("v3"))
    assert "activation_alpha、swiglu_fusion" in result.refused[0].reason
    assert "没有 MoE " in LowerExpertsToOrtMoePass(without("MoE"))(moe_module("v3")).refused[0].reason


@pytest.fixture(scope="module")
def router():
    """只有 ``MoEGroupRouter`` 的会话，由 pass 自己产生。"""
    module = moe_module("v3")
    LowerGateExpertsToOrtMoePass()(module)
    proto = module.to_proto()
    del proto.graph.node[1:]
    proto.graph.ClearField("output")
    shape = ["N", module.config.n_routed_experts]
    proto.graph.output.append(
        helper.make_tensor_value_info(proto.graph.node[0].output[0], onnx.TensorProto.FLOAT, shape)
    )
    del proto.graph.input[:]
    proto.graph.input.extend(
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
        for n, s in (("l", shape), (BIAS, shape[1:]))
    )
    session = ort_session(proto)
    return lambda logits, bias: session.run(None, {"l": logits, BIAS: bias})[0]


#: sigmoid 在这些点上精确（1/2 与 1），加上这些 bias 也精确：分数相等就是真正的并列，不受 1 ulp 的差影响。
EXACT_LOGITS, EXACT_BIAS = st.sampled_from([0.0, 40.0]), st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5])


@settings(max_examples=60, deadline=None)
@given(st.lists(EXACT_LOGITS, min_size=12, max_size=12), st.lists(EXACT_BIAS, min_size=12, max_size=12))
def test_router_breaks_ties_towards_the_smaller_index(router, logits, bias):
    logits, bias = np.array([logits], np.float32), np.array(bias, np.float32)
    ids, weights = moe_gate(
        torch.from_numpy(logits), torch.from_numpy(bias), "sigmoid", 3, 2, "top2_sum", 4, 0, 1.0
    )
    got = router(logits, bias)[0]
    chosen = np.flatnonzero(got > -1e3)
    assert chosen.tolist() == sorted(ids[0].tolist())
    want = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert distance(np.exp(got[chosen]), np.array([want[i] for i in chosen])) < TOLERANCE[torch.float32]
