"""ops/moe_gate.py：对照逐 token 的 Python 实现与 transformers 的 router。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.moe_gate import fake, moe_gate
from tests.models import hf_config

pytestmark = pytest.mark.unit

#: 权重都在 [0, scale] 里，只差 float32 的除法与乘法次序。
WEIGHT_TOLERANCE = 1e-6


def per_token(
    logits, bias, scoring_func, n_group, topk_group, group_score, top_k, norm_topk_prob, scale, outside
):
    """逐 token、逐专家的 Python 实现；打分用 torch（同一个 float32 值才能谈并列），其余全部重写。

    ``outside`` 是组外专家的分数。返回每个 token 的 [(专家, 权重), ...]，按分数降序、并列取小下标。
    """
    all_scores = (logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()).numpy()
    size = logits.shape[-1] // n_group
    result = []
    for scores in all_scores:
        choice = [np.float32(s) + np.float32(b) for s, b in zip(scores, bias.numpy(), strict=True)]
        if group_score != "none":
            groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
            totals = [g[0] if group_score == "max" else g[0] + g[1] for g in groups]
            kept = sorted(range(n_group), key=lambda g: (-totals[g], g))[:topk_group]
            choice = [c if e // size in kept else np.float32(outside) for e, c in enumerate(choice)]
        picked = sorted(range(len(choice)), key=lambda e: (-choice[e], e))[:top_k]
        weights = [float(choice[e] if group_score == "max" else scores[e]) for e in picked]
        if norm_topk_prob:
            total = sum(weights) + 1e-20
            weights = [w / total for w in weights]
        result.append([(e, w * scale) for e, w in zip(picked, weights, strict=True)])
    return result


@st.composite
def routers(draw):
    """一份路由配置与输入；logits 在粗格点上，必有并列。"""
    group_score = draw(st.sampled_from(["none", "max", "top2_sum"]))
    n_group = 1 if group_score == "none" else draw(st.integers(1, 4))
    size = draw(st.integers(2, 6))
    topk_group = draw(st.integers(1, n_group))
    v3 = group_score == "top2_sum"
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    N, E = draw(st.integers(1, 6)), n_group * size
    coarse = draw(st.booleans())
    logits = torch.randn(N, E, generator=g) * 2
    bias = torch.randn(E, generator=g) * v3
    if coarse:
        logits, bias = logits.round(), bias.round()
    return (
        logits,
        bias,
        "sigmoid" if v3 else "softmax",
        n_group,
        topk_group,
        group_score,
        draw(st.integers(1, topk_group * size)),
        int(v3 and draw(st.booleans())),
        draw(st.sampled_from([1.0, 2.5, 16.0])),
    )


def scattered(ids, weights, E):
    """权重散到 [N, E]；没选中的是 0。"""
    return torch.zeros(ids.shape[0], E).scatter(1, ids.long(), weights)


@settings(max_examples=150, deadline=None)
@given(routers())
def test_equals_the_per_token_implementation(arguments):
    """专家（含次序）逐个相同、不重复，权重相符；并列取小下标。"""
    ids, weights = moe_gate(*arguments)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    outside = 0.0 if arguments[5] == "max" else float("-inf")
    for row_ids, row_weights, want in zip(ids, weights, per_token(*arguments, outside), strict=True):
        assert row_ids.tolist() == [e for e, _ in want]
        assert len(set(row_ids.tolist())) == len(want)
        scale = arguments[8]
        assert np.abs(row_weights.numpy() - [w for _, w in want]).max() <= WEIGHT_TOLERANCE * scale


def router_of(variant: str, **overrides):
    """transformers 的 router 与对应的算子属性；隐藏维等于专家数、权重是单位阵，于是输入就是 logits。"""
    config = hf_config(variant, hidden_size=12, **overrides)
    v3 = variant.startswith("v3")
    router = (DeepseekV3TopkRouter if v3 else DeepseekV2TopkRouter)(config)
    router.weight.data = torch.eye(12)
    bias = torch.zeros(12)
    if v3:
        bias = torch.linspace(-1.5, 0.3, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
        router.e_score_correction_bias.copy_(bias)
        group_score = "top2_sum"
    else:
        group_score = "max" if config.topk_method == "group_limited_greedy" else "none"
    attributes = (
        "sigmoid" if v3 else "softmax",
        config.n_group or 1,
        config.topk_group or 1,
        group_score,
        config.num_experts_per_tok,
        int(v3 and config.norm_topk_prob),
        config.routed_scaling_factor,
    )
    return router, bias, attributes


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("v3", {}),
        ("v3-no-norm-topk", {}),
        ("v3-one-group", {}),
        ("v3", {"n_group": 6, "topk_group": 2}),
        ("v3", {"num_experts_per_tok": 8}),
        ("v2-greedy", {}),
        ("v2-group", {}),
        ("v2-group", {"n_group": 6, "topk_group": 3, "num_experts_per_tok": 6}),
    ],
)
def test_equals_transformers(variant, overrides):
    """先比专家集合，再比散开的权重（transformers 的 top-k 不排序）。"""
    router, bias, attributes = router_of(variant, **overrides)
    logits = torch.randn(400, 12, generator=torch.Generator().manual_seed(0)) * 2
    with torch.no_grad():
        _, want_weights, want_ids = router(logits)
    ids, weights = moe_gate(logits, bias, *attributes)
    assert [set(row) for row in ids.tolist()] == [set(row) for row in want_ids.tolist()]
    got, want = scattered(ids, weights, 12), scattered(want_ids, want_weights, 12)
    assert (got - want).abs().max() <= WEIGHT_TOLERANCE * attributes[-1]


def test_ties_go_to_the_smaller_index():
    """并列的专家与并列的组都取小下标。"""
    flat = torch.zeros(2, 16)
    assert (
        moe_gate(flat, torch.zeros(16), "softmax", 1, 1, "none", 4, 0, 1.0)[0].tolist() == [[0, 1, 2, 3]] * 2
    )
    assert (
        moe_gate(flat, torch.zeros(16), "sigmoid", 4, 2, "top2_sum", 6, 1, 1.0)[0].tolist()
        == [list(range(6))] * 2
    )
    assert (
        moe_gate(flat, torch.zeros(16), "softmax", 4, 2, "max", 6, 0, 1.0)[0].tolist() == [list(range(6))] * 2
    )
    flat[0, 9] = flat[0, 13] = 1.0  # 第 2、3 组并列领先，组内再并列
    ids = moe_gate(flat[:1], torch.zeros(16), "sigmoid", 4, 1, "top2_sum", 3, 1, 1.0)[0]
    assert ids.tolist() == [[9, 8, 10]]


def test_negative_biased_scores_need_minus_infinity():
    """V3 带 bias 的分数可能全为负：组外置 0 会选到组外的专家，置 -inf 才对。"""
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    arguments = (logits, torch.full((12,), -2.0), "sigmoid", 3, 1, "top2_sum", 3, 1, 2.5)
    right, wrong = per_token(*arguments, float("-inf")), per_token(*arguments, 0.0)
    ids = moe_gate(*arguments)[0].tolist()
    assert ids == [[e for e, _ in row] for row in right]
    assert all(set(a) != {e for e, _ in b} for a, b in zip(ids, wrong, strict=True)), "置 0 本该选错"
    assert all(len({e // 4 for e in row}) == 1 for row in ids)


def test_bias_selects_but_does_not_weigh():
    """bias 改变选谁，不改变权重。"""
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5]])
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0])
    ids, weights = moe_gate(logits, bias, "sigmoid", 1, 1, "none", 2, 0, 1.0)
    assert ids.tolist() == [[3, 0]]
    assert torch.equal(weights, logits.sigmoid()[:, [3, 0]])


def test_vanishing_scores_do_not_divide_by_zero():
    """选中的分数全是 0 时，归一化的分母是 1e-20 而不是 0。"""
    _, weights = moe_gate(torch.full((1, 4), -200.0), torch.zeros(4), "sigmoid", 1, 1, "none", 2, 1, 2.5)
    assert weights.tolist() == [[0.0, 0.0]]


ARGUMENTS = ("sigmoid", 3, 2, "top2_sum", 4, 1, 2.5)


@pytest.mark.parametrize("N", [0, 1, 5])
def test_fake_matches_eager(N):
    """形状推导与 eager 一致；N 可以为 0。"""
    logits, bias = torch.randn(N, 12), torch.randn(12)
    with FakeTensorMode() as mode:
        shapes = fake(mode.from_tensor(logits), mode.from_tensor(bias), *ARGUMENTS)
    for got, want in zip(moe_gate(logits, bias, *ARGUMENTS), shapes, strict=True):
        assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, want.is_contiguous())


def test_opcheck():
    """torch 自带的算子检查。"""
    torch.library.opcheck(torch.ops.dsx.moe_gate.default, (torch.randn(5, 12), torch.randn(12), *ARGUMENTS))
