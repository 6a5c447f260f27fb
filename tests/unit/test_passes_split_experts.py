"""passes/split_experts.py：拆成几组、结果不变、拆不了就拒绝。"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from deepseek_export.errors import DsxError
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.passes import GraphModule
from deepseek_export.passes.lower_experts_to_ort_moe import LowerExpertsToOrtMoePass
from deepseek_export.passes.lower_gate_experts_to_ort_moe import LowerGateExpertsToOrtMoePass
from deepseek_export.passes.split_experts import SplitExpertsPass
from tests.models import TOLERANCE, distance
from tests.unit.test_passes_moe import WEIGHTS, feeds_for, moe_module, ops, run

pytestmark = pytest.mark.unit

#: 一个专家的元素数；moe_module 有 12 个专家。
EXPERT = 28 * 48


def limited(experts: int, **options) -> GraphModule:
    """一个张量至多放得下 ``experts`` 个专家。"""
    module = moe_module(**options)
    module.max_elements = experts * EXPERT
    return module


def split_feeds(module: GraphModule, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """原来的三个叠放权重切成各组的。"""
    parts = dict(feeds)
    for name, recipe in module.weights.items():
        whole = name.partition("{")[0] + "*" + name.partition("}")[2]
        if "{" in name:
            first = int(recipe.sources[0].split(".experts.")[1].split(".")[0])
            parts[name] = feeds[whole][first : first + recipe.shape[0]]
    return parts


@pytest.mark.parametrize(("fits", "groups"), [(6, 2), (5, 3), (4, 3), (1, 12)])
def test_groups_add_up_to_the_whole(fits: int, groups: int):
    """MOE-20、情形 1：最少的几组（整除专家数），结果与不拆相同；每个权重都装得下，来源恰好各用一次。"""
    whole, module = moe_module(), limited(fits)
    result = SplitExpertsPass()(module)
    assert (result.changed, result.count, result.refused) == (True, 1, ())
    assert ops(module).count("MoeExperts") == groups
    stacks = [recipe for recipe in module.weights.values() if recipe.op == "stack"]
    assert len(stacks) == 3 * groups
    assert all(math.prod(recipe.shape) <= module.max_elements for recipe in stacks)
    before = sorted(s for name in WEIGHTS for s in whole.weights[name].sources)
    assert sorted(s for recipe in stacks for s in recipe.sources) == before
    for rows in (1, 33):
        feeds = feeds_for(whole, rows)
        assert distance(run(module, split_feeds(module, feeds)), run(whole, feeds)) < TOLERANCE[torch.float32]
    assert SplitExpertsPass()(module).changed is False


def test_experts_of_other_groups_never_run():
    """MOE-20：没有 token 的专家换成 NaN，拆开之后结果也不变。"""
    whole, module = moe_module(), limited(4)
    SplitExpertsPass()(module)
    feeds = feeds_for(whole, 1)
    want = run(whole, feeds)
    poisoned = {name: array.copy() for name, array in feeds.items()}
    for expert in range(12):
        trial = {name: array.copy() for name, array in poisoned.items()}
        trial[WEIGHTS[2]][expert] = np.nan
        if np.isfinite(run(whole, trial)).all():
            poisoned = trial
    assert np.isnan(poisoned[WEIGHTS[2]]).any()
    assert distance(run(module, split_feeds(module, poisoned)), want) < TOLERANCE[torch.float32]


def test_ids_outside_the_group_are_skipped_by_the_reference():
    """MOE-20：eager 参考实现跳过 [0, E) 之外的编号，负的也一样。"""
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(shape, generator=generator) for shape in ((5, 8), (4, 6, 8), (4, 6, 8)))
    down, weights = torch.randn(4, 8, 6, generator=generator), torch.rand(5, 3, generator=generator)
    ids = torch.tensor([[0, -1, 4], [3, 9, -7], [1, 2, 3], [-1, -2, 4], [0, 1, 2]], dtype=torch.int32)
    inside = (ids >= 0) & (ids < 4)
    want = moe_experts(x, torch.where(inside, ids, 0), torch.where(inside, weights, 0.0), gate, up, down)
    got = moe_experts(x, ids, weights, gate, up, down)
    assert distance(got, want) < TOLERANCE[torch.float32]
    assert not got[3].any()


def test_small_enough_is_left_alone():
    """情形 2。"""
    module = limited(12)
    before = module.to_proto().SerializeToString()
    assert SplitExpertsPass()(module).changed is False
    assert module.to_proto().SerializeToString() == before


def test_a_single_expert_that_is_too_big_is_refused():
    """情形 3：单个专家就超过上限。"""
    module = moe_module()
    module.max_elements = EXPERT - 1
    with pytest.raises(DsxError, match=f"一个张量至多 {EXPERT - 1} 个") as error:
        SplitExpertsPass()(module)
    assert error.value.code == "DSX-E410"


def test_weights_that_are_not_stacks_are_refused():
    """情形 3：权重不是逐专家叠放的。"""
    module = limited(6)
    module.weights[WEIGHTS[1]] = module.weights[WEIGHTS[1]].model_copy(update={"op": "copy"})
    with pytest.raises(DsxError, match="experts") as error:
        SplitExpertsPass()(module)
    assert error.value.code == "DSX-E410"


def test_groups_are_not_lowered_to_ort_moe():
    """拆开的专家不能变成 com.microsoft::MoE：它每个 token 固定取 k 个；合成的 gate_up 太大也不行。"""
    module = limited(6)
    SplitExpertsPass()(module)
    for step in (LowerGateExpertsToOrtMoePass, LowerExpertsToOrtMoePass):
        result = step()(module)
        assert (result.count, len(result.refused)) == (0, 2)
    assert all("拆成了几组" in refusal.reason for refusal in result.refused)
    fused = limited(12)
    (refusal,) = LowerExpertsToOrtMoePass()(fused).refused
    assert refusal.value == f"{24 * EXPERT} > {12 * EXPERT}"


def test_node_names_and_values_stay_findable():
    """x、topk_ids、topk_weights、y 的名字保留，新节点名不重复。"""
    module = limited(4)
    SplitExpertsPass()(module)
    graph: gs.Graph = module.graph
    assert [output.name for output in graph.outputs] == ["y"]
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    used = {tensor.name for node in graph.nodes for tensor in node.inputs}
    assert {"x", "ids", "w"} <= used
