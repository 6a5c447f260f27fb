"""FoldReshapeShapesPass、SplitPairsPass 与 AbsorbRopeLayoutPass：前两个一位不变、后一个在容差之内，第二遍不再改。"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from deepseek_export.passes.absorb_rope_layout import AbsorbRopeLayoutPass
from deepseek_export.passes.base import GraphModule
from deepseek_export.passes.fold_reshape_shapes import FoldReshapeShapesPass
from deepseek_export.passes.split_pairs import SplitPairsPass
from tests.captured import captured_graph, model_feeds
from tests.models import TOLERANCE, distance, model_config, ort_session

pytestmark = pytest.mark.unit

LAYERS = 3


def outputs(module: GraphModule, checkpoint) -> list[np.ndarray]:
    """两行、40 个 token 的 logits 与第一层的缓存。"""
    ids = np.random.default_rng(0).integers(0, module.config.vocab_size, (2, 40))
    feeds = model_feeds(module, checkpoint, ids, [0, 5], 48, lambda shape: np.ones(shape, np.float32))
    wanted = [t.name for t in module.graph.outputs if t.name == "logits" or t.name.endswith("_cache_out.0")]
    return ort_session(module.to_proto()).run(wanted, feeds)


def operators(module: GraphModule) -> Counter[str]:
    return Counter(node.op for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("v3", 2 * LAYERS),
        ("v3-bias-tied", LAYERS),  # kv_a_proj 带 bias
        ("v2-lite", 0),
    ],
)
def test_the_channel_order_moves_into_the_weights(saved, variant, count):
    """EXPORT-34：两个投影的行序变了，转置没有了，logits 与缓存不变；别的布局、带 bias 的不动。"""
    module, checkpoint = captured_graph(variant), saved(variant)[1]
    want, before = outputs(module, checkpoint), operators(module)
    assert AbsorbRopeLayoutPass()(module).count == count
    changed = {name for name, recipe in module.weights.items() if recipe.op == "deinterleave"}
    assert len(changed) == count
    assert all("q_" in name or "kv_a_proj" in name for name in changed)
    assert before["Transpose"] - operators(module)["Transpose"] == count
    for got, expected in zip(outputs(module, checkpoint), want, strict=True):
        assert distance(got, expected) < TOLERANCE[torch.float32]
    assert not AbsorbRopeLayoutPass()(module).changed


@pytest.mark.parametrize("variant", ["v3", "v2-lite"])
@pytest.mark.parametrize("absorbed", [False, True])
def test_shapes_are_constants(saved, variant, absorbed):
    """EXPORT-34：形状不再逐层拼，结果一位不变。"""
    module, checkpoint = captured_graph(variant), saved(variant)[1]
    if absorbed:
        AbsorbRopeLayoutPass()(module)
    want = outputs(module, checkpoint)
    assert FoldReshapeShapesPass()(module).changed
    assert operators(module)["Concat"] <= LAYERS
    assert operators(module)["Shape"] <= 2 * LAYERS + 1
    for got, expected in zip(outputs(module, checkpoint), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not FoldReshapeShapesPass()(module).changed


@pytest.mark.parametrize(
    ("variant", "profile", "count"),
    [
        ("v3", "mla+moe", 2 * LAYERS),
        ("v3", "moe", 2 * LAYERS),
        ("v3-bias-tied", "mla+moe", 2 * LAYERS),
        ("v2-lite", "mla", 0),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_pairs_become_halves_without_a_transpose(saved, variant, profile, count, folded):
    """EXPORT-34：成对改成前后两半，不用转置，一位不变；别的布局没有这样的转置。"""
    module, checkpoint = captured_graph(variant, profile), saved(variant)[1]
    if folded:
        FoldReshapeShapesPass()(module)
    want, before = outputs(module, checkpoint), operators(module)
    assert SplitPairsPass()(module).count == count
    assert before["Transpose"] - operators(module)["Transpose"] == count
    for got, expected in zip(outputs(module, checkpoint), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not SplitPairsPass()(module).changed


def test_after_the_order_moved_into_the_weights_only_the_rest_is_split():
    """EXPORT-34：量化时行序已经排进权重的，没有转置可换；带 bias 的那一半照换。"""
    module = captured_graph("v3-bias-tied")
    AbsorbRopeLayoutPass()(module)
    assert SplitPairsPass()(module).count == LAYERS


def reshaped(before, after) -> GraphModule:
    """借一个真的模块，图换成一个 ``Reshape``。"""
    x, y = gs.Variable("x", np.float32, before), gs.Variable("y", np.float32, after)
    z, shape = gs.Variable("z", np.float32, after), gs.Variable("s", np.int64, [len(after)])
    nodes = [
        gs.Node("Reshape", "n", inputs=[x, shape], outputs=[y], attrs={"allowzero": 1}),
        gs.Node("Relu", "m", inputs=[y], outputs=[z]),
    ]
    graph = gs.Graph(nodes, inputs=[x, shape], outputs=[z], opset=24)
    return GraphModule(graph, {}, {}, "float32", model_config("v3"), (), "main", (), None)


@pytest.mark.parametrize(
    ("before", "after", "target"),
    [
        (["B", "S", 12], ["B", "S", 3, 4], [0, 0, 3, 4]),
        (["B", "S", 12], ["B*S", 12], [-1, 12]),
        (["B", 1, "S", 12], ["B", "S", 12], [0, -1, 12]),
        ([6, "S"], ["S", 6], [-1, 6]),
        (["B*S", 12], ["B", "S", 12], None),
        (None, ["B", 12], None),
        (["B", 12], ["B", None], None),
    ],
)
def test_what_can_be_known_ahead(before, after, target):
    module = reshaped(before, after)
    assert FoldReshapeShapesPass()(module).changed == (target is not None)
    shape = module.find("Reshape", domain="")[0].inputs[1]
    assert isinstance(shape, gs.Constant) == (target is not None)
    if target is not None:
        assert shape.values.tolist() == target


def test_a_round_trip_disappears():
    """[B, S, dr] 展成 [B, 1, S, dr] 又压回去：直接用起点。"""
    module = reshaped(["B", 12], ["B", 12])
    assert FoldReshapeShapesPass()(module).changed
    assert [node.op for node in module.graph.nodes] == ["Relu"]
    assert module.graph.nodes[0].inputs[0].name == "x"


@pytest.mark.parametrize("variant", ["v3", "v2-lite"])
def test_ports_of_dsx_nodes_keep_their_names(variant):
    """逐算子校验按名字找每个 dsx 节点的输入与输出。"""
    module = captured_graph(variant)
    AbsorbRopeLayoutPass()(module)
    FoldReshapeShapesPass()(module)
    known = {tensor.name for node in module.graph.nodes for tensor in (*node.inputs, *node.outputs)}
    for site in module.sites:
        assert {*site.inputs, *site.outputs} <= known
