"""参考实现与函数体对 specs/mla、specs/moe 的承诺；每个测试的 docstring 写明它证明的需求号。"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.ops.mla_attention import mla_attention
from deepseek_export.ops.moe_experts import experts_dense, moe_experts
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import MOE_EXPERTS
from deepseek_export.reference import Forms, cache_tensors, load_reference
from tests.models import ODD, TOLERANCE, distance, one_node_model, ort_session

pytestmark = pytest.mark.contract

TIGHT = TOLERANCE[torch.float32]
PUBLISHED = Path(__file__).parents[2] / "tools/published_configs.json"


def mla_inputs(past, S=3, T=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, H, dn, dr, dv, r = len(past), 3, 24, 16, 20, 40
    shapes = ((B, S, H, dn), (B, S, H, dr), (B, S, r), (B, S, dr), (B, 1, T, r + dr))
    tensors = [torch.randn(shape, generator=g) for shape in shapes]
    w = torch.randn(H * (dn + dv), r, generator=g) * r**-0.5
    return [*tensors, torch.tensor(past), w, (dn + dr) ** -0.5]


@pytest.mark.parametrize("S", [1, 3, 16])
def test_absorb_equals_naive(S):
    """MLA-1：absorb 与 naive 数学上相等，auto 是其中之一。"""
    inputs = mla_inputs([0, 16 - S], S)
    absorb, naive, auto = (mla_attention(*inputs, form=form)[0] for form in ("absorb", "naive", "auto"))
    assert distance(absorb, naive) < TIGHT
    assert torch.equal(auto, absorb) or torch.equal(auto, naive)


@pytest.mark.parametrize("variant", ["v3-yarn", "v2-lite"])
def test_absorb_equals_naive_in_a_model(saved, variant):
    """MLA-1：整个模型里 absorb、naive 与展开的基线给出相同的 logits。"""
    ids = torch.randint(0, 211, (2, 80), generator=torch.Generator().manual_seed(0))
    results = []
    for attention in ("absorb", "naive", "expanded"):
        model = load_reference(saved(variant)[1], Forms(attention, "sparse"))
        positions = torch.arange(80).expand(2, -1)
        results.append(model(ids, torch.zeros(2, dtype=torch.int64), positions, model.empty_caches(2, 80))[0])
    assert distance(results[0], results[1]) < TIGHT
    assert distance(results[0], results[2]) < TIGHT


@pytest.mark.parametrize("form", ["absorb", "naive"])
def test_visibility(form):
    """MLA-2：key j 对 query i 可见当且仅当 ``j <= past_lens[b] + i``：逐个 key 扰动，看哪些 query 变了。"""
    past, S, T = [0, 5], 3, 10
    inputs = mla_inputs(past, S, T)
    before = mla_attention(*inputs, form=form)[0]
    for b, start in enumerate(past):
        for j in range(T):
            changed = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]
            if start <= j < start + S:  # 这一行由本次的新 token 写入
                changed[2][b, j - start] += 1.0
            else:
                changed[4][b, 0, j] += 1.0
            moved = (mla_attention(*changed, form=form)[0] - before).abs().amax((-1, -2)) > 0
            want = torch.zeros_like(moved)
            want[b] = torch.tensor([j <= start + i for i in range(S)])
            assert torch.equal(moved, want), (b, j)


def test_cache_is_written_at_past_lens():
    """MLA-2：新行写在 ``past_lens[b]..past_lens[b]+S-1``，其余不变。"""
    inputs = mla_inputs([0, 5], 3, 10)
    cache = mla_attention(*inputs)[1]
    same = (cache == inputs[4]).all(-1)[:, 0]
    assert same.tolist() == [[not start <= j < start + 3 for j in range(10)] for start in (0, 5)]


@pytest.mark.parametrize(("name", "expanded"), [("V2_LITE", 5120), ("V3", 40960)])
def test_latent_cache_size(name, expanded):
    """MLA-3：每 token 每层缓存 kv_lora_rank+qk_rope_head_dim = 576 个值，展开则是 5120 / 40960。"""
    data = json.loads(PUBLISHED.read_text())[name]
    data.pop("quantization_config", None)
    config = parse_model_config(data, name)

    def values(forms: Forms) -> int:
        found = cache_tensors(config, forms, torch.float32, torch.float32, 0)
        return sum(tensor.heads * tensor.width for tensor in found)

    assert values(Forms("auto", "sparse", as_ops=True)) == config.latent_cache_values == 576
    assert values(Forms("expanded", "dense")) == config.expanded_cache_values == expanded


@pytest.fixture
def routed():
    """12 个专家里只用到 3 个；另有一份把其余专家的权重换成 NaN 的输入。"""
    g = torch.Generator().manual_seed(0)
    E, D, inner, k = (
        ODD[n] for n in ("n_routed_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")
    )
    ids = torch.tensor([[1, 4, 7, 9], [9, 7, 4, 1], [4, 9, 1, 7]], dtype=torch.int32)
    assert ids.shape[1] == k
    shapes = ((E, inner, D), (E, inner, D), (E, D, inner))
    clean = [torch.randn(s, generator=g) * s[-1] ** -0.5 for s in shapes]
    poisoned = [w.clone() for w in clean]
    for w in poisoned:
        w[[e for e in range(E) if e not in (1, 4, 7, 9)]] = float("nan")
    head = (torch.randn(3, D, generator=g), ids, torch.rand(3, k, generator=g))
    return (*head, *clean), (*head, *poisoned)


def test_only_routed_experts_run(routed):
    """MOE-1：只运行被选中的专家：其余专家的权重全是 NaN，结果仍然有限且逐位相同。"""
    clean, poisoned = routed
    assert torch.equal(moe_experts(*poisoned), moe_experts(*clean))
    assert experts_dense(*poisoned).isnan().all(), "基线每个专家都跑，应当被 NaN 污染"


def test_only_routed_experts_run_in_the_body(routed, bodies):
    """MOE-1：ONNX 函数体在 ONNX Runtime 里同样只运行被选中的专家。"""
    clean, poisoned = (
        {p.name: t.numpy() for p, t in zip(MOE_EXPERTS.inputs, r, strict=True)} for r in routed
    )
    session = ort_session(one_node_model(bodies("experts", torch.float32), clean, {"y": np.float32}))
    got = session.run(None, poisoned)[0]
    assert np.isfinite(got).all()
    assert np.array_equal(got, session.run(None, clean)[0])
    assert distance(got, moe_experts(*routed[0])) < TIGHT


@pytest.mark.parametrize("norm", [0, 1])
def test_bias_selects_scores_weigh(norm):
    """MOE-2：选专家用带 bias 的分数，权重取不带 bias 的分数。"""
    g = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(64, 12, generator=g), torch.randn(12, generator=g)
    ids, weights = moe_gate(logits, bias, "sigmoid", 1, 1, "top2_sum", 4, norm, 2.5)
    scores = logits.sigmoid()
    want = [set(row) for row in (scores + bias).topk(4).indices.tolist()]
    assert [set(row) for row in ids.tolist()] == want
    assert want != [set(row) for row in scores.topk(4).indices.tolist()], "bias 没有改变选择，测试没有用"
    raw = scores.gather(1, ids.long())
    assert distance(weights, 2.5 * (raw / raw.sum(-1, keepdim=True) if norm else raw)) < TIGHT


@pytest.mark.parametrize(
    ("scoring", "group_score", "n_group"),
    [("softmax", "none", 1), ("softmax", "max", 4), ("sigmoid", "top2_sum", 4)],
)
def test_ties_take_the_smaller_index(scoring, group_score, n_group):
    """MOE-3：并列（专家之间、组之间）取小下标。"""
    arguments = (scoring, n_group, min(2, n_group), group_score, 5, 0, 1.0)
    ids, _ = moe_gate(torch.full((3, 16), 0.25), torch.zeros(16), *arguments)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
