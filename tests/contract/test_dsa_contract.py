"""specs/dsa：选择的语义，与 transformers 自己的模型相等，config.json 的写法。"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_export.checkpoint import Checkpoint, ModelConfig
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.errors import DsxError
from deepseek_export.ops.lightning_indexer import index_scores, lightning_indexer
from deepseek_export.parity.selection import ranking
from deepseek_export.parity.tolerances import SELECTION_BAND
from deepseek_export.reference import Forms, ReferenceModel, load_draft, load_reference
from tests.models import DSA, ODD, distance, fp8_twins, model_config
from tests.sparse_models import LOGITS, TOPK, logits, tokens, vars_of

pytestmark = pytest.mark.contract

SPARSE = ("v32", "glm-dsa")


def settled(model: ReferenceModel, ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool：到这个 token 为止，没有一层的选择在并列带之内，所以谁的末位误差都换不了 key。"""
    caches, past = model.empty_caches(*ids.shape), torch.zeros(ids.shape[0], dtype=torch.int64)
    x, cos, sin = model.embed(ids, past)
    selection: tuple[torch.Tensor, ...] = ()
    near = torch.zeros(ids.shape, dtype=torch.bool)
    for layer, cache in zip(model.layers, caches, strict=True):
        ranked = ranking(layer, x, cos, sin, past, cache)
        if ranked is not None:
            near |= ranked.margin < SELECTION_BAND["float32"]
        _, x, _, selection = layer.step(x, cos, sin, past, cache, selection)
    return near.cumsum(1) == 0


def index_inputs(B: int, S: int, T: int, past: list[int], seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, w = torch.randn(B, S, 32, 24, generator=g), torch.randn(B, S, 32, generator=g)
    k, cache = torch.randn(B, S, 24, generator=g), torch.randn(B, 1, T, 24, generator=g)
    return [q, w, k, cache, torch.tensor(past)]


@pytest.mark.parametrize(
    ("S", "T", "past"), [(1, 40, [39, 7]), (5, 40, [0, 35]), (9, 9, [0, 0]), (12, 13, [0, 1])]
)
def test_what_is_selected(S: int, T: int, past: list[int]):
    """DSA-1：对照逐个 query 的排序：看得见的里取分数最大的，升序，其余 -1，个数不超过 topk。"""
    topk = 10
    inputs = index_inputs(2, S, T, past)
    indices, counts, cache = lightning_indexer(*inputs, topk)
    scores = index_scores(inputs[0], inputs[1], cache)
    for b, i in itertools.product(range(2), range(S)):
        visible = past[b] + i + 1
        ranked = sorted(range(visible), key=lambda j: (-scores[b, i, j].item(), j))
        want = sorted(ranked[:topk])
        assert counts[b, i] == len(want) == min(visible, topk)
        assert indices[b, i].tolist() == want + [-1] * (topk - len(want))


def test_ties_go_to_the_smaller_position():
    """DSA-1：分数全相等时取最前面的。"""
    q, w, k, cache, past = index_inputs(1, 1, 30, [29])
    indices, _, _ = lightning_indexer(q, torch.zeros_like(w), k, cache, past, 10)
    assert indices[0, 0].tolist() == list(range(10))


def test_chunks_and_rows_select_the_same():
    """DSA-1：分两块、同批还有别的长短不一的行，选出的与一次走完、单独走相同。"""
    q, w, k, cache, _ = index_inputs(1, 30, 40, [0])
    whole, _, _ = lightning_indexer(q, w, k, cache, torch.tensor([0]), 10)
    first, _, middle = lightning_indexer(q[:, :13], w[:, :13], k[:, :13], cache, torch.tensor([0]), 10)
    second, _, _ = lightning_indexer(q[:, 13:], w[:, 13:], k[:, 13:], middle, torch.tensor([13]), 10)
    assert torch.equal(torch.cat([first, second], 1), whole)
    other = index_inputs(1, 17, 40, [3], seed=5)
    both = [
        torch.cat([a, b])
        for a, b in zip((q[:, 13:], w[:, 13:], k[:, 13:], middle, torch.tensor([13])), other, strict=True)
    ]
    assert torch.equal(lightning_indexer(*both, 10)[0][:1], second)


@pytest.mark.parametrize("variant", SPARSE)
@pytest.mark.parametrize("length", [TOPK - 1, TOPK, TOPK + 1, 5 * TOPK])
def test_logits_equal_transformers(saved, variant: str, length: int):
    """DSA-4：长度低于、等于、高于、远高于 index_topk；一次走完、分块、逐个 token。"""
    hf, checkpoint = saved(variant)
    ids = tokens(length, 2)
    with torch.no_grad():
        want = hf(ids).logits
    kept = settled(load_reference(checkpoint, Forms("absorb", "sparse")), ids)
    assert kept.float().mean() > 0.6, "并列太多，测试没有用"
    for form in ("absorb", "expanded"):
        model = load_reference(checkpoint, Forms(form, "sparse"))
        assert distance(logits(model, ids)[kept], want[kept]) < LOGITS
    for chunks in ([7, length - 7], [length - 3, 1, 1, 1]):
        assert distance(logits(model, ids, chunks)[kept], want[kept]) < LOGITS


def test_short_sequences_equal_v3(saved, tmp_path: Path):
    """DSA-4：长度与容量都不超过 index_topk 时，与去掉索引器的 V3 逐位相等；再长一个就不等。"""
    checkpoint = saved("v32")[1]
    sparse = load_reference(checkpoint, Forms("auto", "sparse"))
    dense = load_reference(checkpoint, Forms("auto", "sparse"))
    for layer in dense.layers:
        layer.self_attn.indexer = None
    ids = tokens(TOPK + 1)

    def both(length: int) -> list[torch.Tensor]:
        results = []
        for model in (sparse, dense):
            caches = [cache[: 2 if model is sparse else 1] for cache in sparse.empty_caches(1, length)]
            positions = torch.arange(length)[None]
            results.append(model(ids[:, :length], torch.tensor([0]), positions, caches)[0])
        return results

    assert torch.equal(*both(TOPK))
    assert distance(*both(TOPK + 1)) > 100 * LOGITS


def test_fp8_checkpoints(tmp_path: Path):
    """DSA-4：FP8 分块的 V3.2（索引器的 wq_b、wk 也是 FP8）与它反量化的孪生相等。"""
    base: dict[str, Any] = {
        **{key: value for key, value in ODD.items() if value is not None},
        **DSA,
        "model_type": "deepseek_v32",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [16, 16],
        },
    }
    fp8, twin = (Checkpoint.open(path) for path in fp8_twins(tmp_path, base, mtp=True))
    assert fp8.store["model.layers.1.self_attn.indexer.wq_b.weight"].dtype == "F8_E4M3"
    assert fp8.store["model.layers.1.self_attn.indexer.weights_proj.weight"].dtype == "F32"
    ids = tokens(60)
    models = [load_reference(checkpoint, Forms("auto", "sparse")) for checkpoint in (fp8, twin)]
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))
    drafts = [load_draft(checkpoint, 0, model) for checkpoint, model in zip((fp8, twin), models, strict=True)]
    hidden, rows = torch.randn(1, 60, ODD["hidden_size"]), torch.arange(60)[None]
    got = [
        draft(ids, hidden, torch.tensor([0]), rows, models[0].empty_caches(1, 60)[0])[0] for draft in drafts
    ]
    assert torch.equal(*got)


def config(variant: str, **changes: Any) -> ModelConfig:
    data = {**vars_of(variant), **changes}
    return parse_model_config({key: value for key, value in data.items() if value is not None}, variant)


def test_the_spellings_of_shared_layers():
    """DSA-8：三种写法与缺省；规则 max(i - offset + 1, 0) % freq == 0。"""
    want = (True, False, True, False)
    assert model_config("glm-dsa").indexer.full_layers == want
    assert config("glm-dsa", indexer_types=None, index_topk_pattern="FSFS").indexer.full_layers == want
    by_rule = config("glm-dsa", indexer_types=None, index_topk_freq=2, index_skip_topk_offset=1)
    assert by_rule.indexer.full_layers == want
    assert config("glm-dsa", indexer_types=None).indexer.full_layers == (True,) * 4
    deep = config(
        "glm-dsa", indexer_types=None, index_topk_freq=4, index_skip_topk_offset=3, num_hidden_layers=12
    )
    assert [i for i, full in enumerate(deep.indexer.full_layers) if full] == [0, 1, 2, 6, 10]
    assert (
        config("glm-dsa", index_topk_pattern="FSFS", indexer_rope_interleave=True).indexer.full_layers == want
    )
    assert (
        config("v32", indexer_rope_interleave=False, layer_types=["indexed_attention"] * 3).indexer.topk == 24
    )
    assert config("glm-dsa", head_dim=24, index_share_for_mtp_iteration=True, moe_router_dtype="float32")


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("v32", {"indexer_rope_interleave": True}),
        ("glm-dsa", {"indexer_rope_interleave": False}),
        ("glm-dsa", {"indexer_types": ["shared", "full", "full", "full"]}),
        ("glm-dsa", {"indexer_types": ["full", "shared"]}),
        ("glm-dsa", {"index_topk_pattern": "FSSF"}),
        ("glm-dsa", {"index_topk_freq": 3}),
        ("glm-dsa", {"indexer_types": None, "index_skip_topk_offset": 2}),
        ("glm-dsa", {"indexer_types": None, "index_topk_pattern": "FXFF"}),
        ("v32", {"layer_types": ["full_attention"] * 3}),
        ("v32", {"q_lora_rank": None}),
        ("v32", {"index_topk": 0}),
        ("v32", {"index_head_dim": 16}),
        ("v32", {"index_n_heads": "many"}),
    ],
)
def test_contradictions_are_refused(variant: str, change: dict[str, Any]):
    """DSA-8：取值不支持、互相矛盾的以 DSX-E130 拒绝。"""
    with pytest.raises(DsxError) as caught:
        parse_model_config({**vars_of(variant), **change}, variant)
    assert caught.value.code == "DSX-E130"
