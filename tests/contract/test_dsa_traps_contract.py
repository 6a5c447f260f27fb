"""specs/dsa：别人踩过的坑一个个种进去，都要被发现；选错与打分错分得开。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_export
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.parity.measures import measure
from deepseek_export.parity.selection import Ranking, mask_of
from deepseek_export.parity.tolerances import SELECTION_BAND
from deepseek_export.reference import Forms, ReferenceModel, load_draft, load_reference
from deepseek_export.reference.indexer import Indexer
from tests.bundles import edit_model, edit_weight, tampered
from tests.models import ODD, build_model, distance, save_checkpoint
from tests.sparse_models import LOGITS, TOPK, logits, tokens, vars_of

pytestmark = pytest.mark.contract


def test_swaps_are_allowed_only_inside_the_tie_band():
    """DSA-11：离第 topk 名不到并列带的换一个不算错；带外的、少一个的都不通过，余弦型差异是 Dice 距离。"""
    scores = torch.tensor([[[5.0, 4.0, 3.0, 3.0 - 1e-6, 1.0, float("-inf")]]])
    want = mask_of(np.array([[[0, 1, 2]]]), 6)
    near = mask_of(np.array([[[0, 1, 3]]]), 6)
    far = mask_of(np.array([[[0, 1, 4]]]), 6)
    few = mask_of(np.array([[[0, 1, -1]]]), 6)
    ranked, band = Ranking(scores, 3), SELECTION_BAND["float32"]
    assert measure(far, want).calc_diff == pytest.approx(1 - 2 / 3)
    for got, swapped in ((want, 0), (near, 1), (far, 0), (few, 0)):
        kept, ties = ranked.without_ties(got, want, band)
        assert ties == swapped
        assert np.array_equal(kept, want) == (got is want or got is near)
    assert ranked.margin.item() < band
    assert Ranking(scores[..., :3], 3).margin.item() == float("inf")


def indexers(model: ReferenceModel) -> list[Indexer]:
    return [module for module in model.modules() if isinstance(module, Indexer)]


def wrong_layout(model: ReferenceModel) -> None:
    for indexer in indexers(model):
        flipped = {"half": "deinterleaved", "deinterleaved": "half"}[indexer.indexer.rope_layout]
        object.__setattr__(
            indexer, "indexer", type(indexer.indexer)(**vars(indexer.indexer) | {"rope_layout": flipped})
        )


def wrong_lanes(model: ReferenceModel) -> None:
    for indexer in indexers(model):
        right = indexer._rotated

        def last(x, cos, sin, right=right):
            return right(x.flip(-1), cos, sin).flip(-1)

        indexer._rotated = last  # type: ignore[method-assign]


def wrong_eps(model: ReferenceModel) -> None:
    for indexer in indexers(model):
        indexer.k_norm.eps = 1e-5


def lost_bias(model: ReferenceModel) -> None:
    for indexer in indexers(model):
        indexer.k_norm.bias.data.zero_()


def absolute_weights(model: ReferenceModel) -> None:
    for indexer in indexers(model):
        indexer.weights_proj.register_forward_hook(lambda module, given, out: out.abs())


def own_ranking(model: ReferenceModel) -> None:
    """沿用的层拿前一层的索引器自己排名。"""
    for shared, full in ((1, 0), (3, 2)):
        attention, indexer = model.layers[shared].self_attn, model.layers[full].self_attn.indexer
        plain = attention.forward

        def ranked(x, cos, sin, past, caches, selection, plain=plain, indexer=indexer, attention=attention):
            latent = attention.q_a_layernorm(attention.q_a_proj(x))
            cache = torch.zeros(x.shape[0], 1, 128, 24)
            indices, counts, _ = indexer(x, latent, cos, sin, cache, past)
            return plain(x, cos, sin, past, caches, (indices, counts))

        attention.forward = ranked


#: 坑 → (变体, 种进参考实现的错)。
PLANTED: dict[str, tuple[str, Callable[[ReferenceModel], None]]] = {
    "V3.2 的索引器用成对的 RoPE": ("v32", wrong_layout),
    "GLM-5 的索引器用前后两半的 RoPE": ("glm-dsa", wrong_layout),
    "旋转后面的 lane": ("v32", wrong_lanes),
    "k_norm 的 eps": ("v32", wrong_eps),
    "k_norm 的 bias": ("glm-dsa", lost_bias),
    "各头权重的符号": ("v32", absolute_weights),
    "沿用的层自己排名": ("glm-dsa", own_ranking),
}


@pytest.mark.parametrize("trap", PLANTED)
def test_planted_mistakes_are_caught(tmp_path: Path, trap: str):
    """DSA-5：种进去的错在长度超过 index_topk 之后被发现，不超过时看不出来。"""
    variant, plant = PLANTED[trap]
    hf = build_model(variant)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("indexer.wk.weight"):
                parameter.mul_(0.01)  # k 的方差小，eps 才看得出来
    checkpoint, ids = Checkpoint.open(save_checkpoint(hf, tmp_path)), tokens(90)
    with torch.no_grad():
        want = hf(ids).logits
    model = load_reference(checkpoint, Forms("auto", "sparse"))
    assert distance(logits(model, ids), want) < LOGITS
    plant(model)
    got = logits(model, ids)
    assert distance(got[:, :TOPK], want[:, :TOPK]) < LOGITS
    assert distance(got, want) > 100 * LOGITS, trap


def test_lost_index_keys_are_caught(saved):
    """DSA-5：恢复缓存时漏了索引 key，之后选错；分块 prefill 只在本块里排名也是这样错的。"""
    hf, checkpoint = saved("v32")
    ids = tokens(70)
    with torch.no_grad():
        want = hf(ids).logits[:, 60:]
    model = load_reference(checkpoint, Forms("auto", "sparse"))
    rows = torch.arange(60)[None]
    _, _, caches = model(ids[:, :60], torch.tensor([0]), rows, model.empty_caches(1, 80))
    lost = [(latent, torch.zeros_like(keys)) for latent, keys in caches]
    for kept, right in ((caches, True), (lost, False)):
        got = model(ids[:, 60:], torch.tensor([60]), torch.arange(10)[None], kept)[0]
        assert (distance(got, want) < LOGITS) == right
    assert distance(got, want) > 100 * LOGITS


def test_ranking_only_the_chunk_is_caught(saved):
    """DSA-5：分块 prefill 只在本块里排名：第一块看不出来，后面的块错。"""
    hf, checkpoint = saved("v32")
    ids = tokens(70)
    with torch.no_grad():
        want = hf(ids).logits
    model = load_reference(checkpoint, Forms("auto", "sparse"))
    for indexer in indexers(model):

        def chunk_only(x, latent, cos, sin, cache, past, right=indexer.forward):
            _, _, written = right(x, latent, cos, sin, cache, past)
            fresh = torch.zeros_like(cache)[:, :, : x.shape[1]]
            indices, counts, _ = right(x, latent, cos, sin, fresh, torch.zeros_like(past))
            return torch.where(indices < 0, -1, indices + past[:, None, None]).int(), counts, written

        indexer.forward = chunk_only
    assert distance(logits(model, ids), want) < LOGITS
    got = logits(model, ids, [40, 30])
    assert distance(got[:, :40], want[:, :40]) < LOGITS
    assert distance(got[:, 40:], want[:, 40:]) > 100 * LOGITS


@pytest.mark.parametrize("mistake", ["没有写索引 key", "沿用主模型选的"])
def test_drafts_that_skip_their_indexer_are_caught(tmp_path: Path, mistake: str):
    """DSA-5：草稿的索引 key 每一步都写、每一步自己排名；漏写的、拿主模型的选择开头的，越过名额之后都不同。"""
    checkpoint = Checkpoint.open(
        write_checkpoint(tmp_path / "x", vars_of("glm-dsa"), dtype="float32", mtp=True)
    )
    model = load_reference(checkpoint, Forms("absorb", "sparse"))
    draft = load_draft(checkpoint, 0, model)
    ids, hidden = (
        tokens(60),
        torch.randn(1, 60, ODD["hidden_size"], generator=torch.Generator().manual_seed(4)),
    )

    def walk(lose: bool) -> torch.Tensor:
        caches, found = model.empty_caches(1, 60)[0], []
        for start, stop in ((0, 45), (45, 60)):
            rows = torch.arange(stop - start)[None]
            part, _, caches = draft(
                ids[:, start:stop], hidden[:, start:stop], torch.tensor([start]), rows, caches
            )
            caches = (caches[0], torch.zeros_like(caches[1])) if lose else caches
            found.append(part)
        return torch.cat(found, 1)

    want = draft(ids, hidden, torch.tensor([0]), torch.arange(60)[None], model.empty_caches(1, 60)[0])[0]
    assert distance(walk(lose=False), want) < LOGITS
    if mistake == "没有写索引 key":
        got = walk(lose=True)
    else:
        attention = draft.mtp.self_attn
        plain, indexer = attention.forward, model.layers[2].self_attn.indexer

        def skips(x, cos, sin, past, caches, selection):
            latent = attention.query_latent(x)
            chosen = indexer(x, latent, cos, sin, torch.zeros_like(caches[1]), past)[:2]
            attention.indexer = None
            return plain(x, cos, sin, past, caches, chosen)

        attention.forward = skips
        got = draft(ids, hidden, torch.tensor([0]), torch.arange(60)[None], model.empty_caches(1, 60)[0])[0]
    assert distance(got[:, :TOPK], want[:, :TOPK]) < LOGITS
    assert distance(got, want) > 100 * LOGITS


def culprit_of(bundle, folder: Path, change):
    bad = tampered(bundle, folder, change)
    found = deepseek_export.compare(bad.path, blocks=["0"], bisect=True, folder=folder / "out").culprit
    assert found is not None
    return found


def test_bisect_tells_a_wrong_pick_from_a_wrong_score(exported, tmp_path: Path):
    """DSA-11：选错了，指到索引器的节点，打分的输入都对；打分错了，指到算分的那个矩阵乘与它的权重。"""
    bundle = exported("v32", "mla+moe")

    def smallest(model) -> None:
        body = next(function for function in model.functions if function.name == "LightningIndexer")
        choose = next(node for node in body.node if node.op_type == "If")
        loop = next(node for branch in choose.attribute for node in branch.g.node if node.op_type == "Loop")
        ranked = next(node for node in loop.attribute[0].g.node if node.op_type == "TopK")
        next(a for a in ranked.attribute if a.name == "largest").i = 0

    found = culprit_of(bundle, tmp_path / "pick", edit_model(smallest))
    assert [node.op for node in found.nodes] == ["dsx::LightningIndexer"]
    assert found.value.endswith("indices") or "lightning_indexer" in found.value
    name = "model.layers.0.self_attn.indexer.wq_b.weight"
    found = culprit_of(bundle, tmp_path / "score", edit_weight(bundle, name, lambda w: w[::-1]))
    assert "LightningIndexer" not in found.nodes[-1].op
    (cause,) = found.causes
    assert cause.startswith(f"权重 {name} 与检查点不同")


@pytest.mark.heavy
@pytest.mark.slow
def test_bisect_where_nothing_is_ranked(tmp_path: Path):
    """DSA-11：名额够，图里不算索引器的 query，别处的错照样指得到。"""
    path = write_checkpoint(tmp_path / "x", vars_of("v32") | {"index_topk": 400}, dtype="float32")
    bundle = deepseek_export.export(path, tmp_path / "out", "mla+moe", target="ort-cpu")
    name = "model.layers.0.self_attn.o_proj.weight"
    found = culprit_of(bundle, tmp_path / "bad", edit_weight(bundle, name, lambda w: w[::-1]))
    (cause,) = found.causes
    assert cause.startswith(f"权重 {name} 与检查点不同")
