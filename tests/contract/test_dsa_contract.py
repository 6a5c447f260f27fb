"""specs/dsa：稀疏注意力与 transformers 自己的模型相等；别人踩过的坑一个个种进去，都要被发现。"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepseek_export
from deepseek_export.backend.contract import CACHE_KINDS
from deepseek_export.checkpoint import Checkpoint, ModelConfig
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.errors import DsxError
from deepseek_export.ops.lightning_indexer import index_scores, lightning_indexer
from deepseek_export.parity.checks import LEVELS
from deepseek_export.parity.measures import measure
from deepseek_export.parity.selection import Ranking, mask_of, ranking
from deepseek_export.parity.tolerances import SELECTION_BAND
from deepseek_export.profile import resolve_profile
from deepseek_export.reference import Forms, ReferenceModel, load_draft, load_reference
from deepseek_export.reference.indexer import Indexer
from tests.bundles import edit_model, edit_weight, tampered
from tests.models import (
    DSA,
    ODD,
    TOLERANCE,
    VARIANTS,
    build_model,
    distance,
    fp8_twins,
    model_config,
    save_checkpoint,
)

pytestmark = pytest.mark.contract

LOGITS = TOLERANCE[torch.float32]
TOPK = DSA["index_topk"]
SPARSE = ("v32", "glm-dsa")


def tokens(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, ODD["vocab_size"], (batch, length), generator=g)


def logits(
    model: ReferenceModel, ids: torch.Tensor, chunks: list[int] | None = None, capacity: int = 128
) -> torch.Tensor:
    """分几次走完，全部位置的 logits。"""
    B, caches, parts, start = ids.shape[0], model.empty_caches(ids.shape[0], capacity), [], 0
    for size in chunks or [ids.shape[1]]:
        positions = torch.arange(size).expand(B, -1)
        past = torch.full((B,), start)
        got, _, caches = model(ids[:, start : start + size], past, positions, caches)
        parts.append(got)
        start += size
    return torch.cat(parts, 1)


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
    from deepseek_export.checkpoint.synthetic import write_checkpoint

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


def test_index_keys_are_a_cache(exported):
    """DSA-6：自己排名的层才有 index_cache，写进 I/O 与 manifest；存取一行、复制前缀、按长度回滚都带着它。"""
    bundle = exported("glm-dsa", "mla+moe")
    cache = bundle.manifest.cache
    assert [[tensor.name for tensor in cache.of_layer(layer)] for layer in range(4)] == [
        ["kv_cache", "index_cache"],
        ["kv_cache"],
    ] * 2
    assert cache.bytes_per_token == 4 * (4 * 56 + 2 * 24)
    model = deepseek_export.load(bundle.path)
    runner = model.session.runner
    assert [t.kind for t in runner.contract.caches.tensors] == ["latent", "index", "latent"] * 1 + [
        "latent",
        "index",
        "latent",
    ]
    assert CACHE_KINDS["index_cache"] == "index"
    assert runner.contract.caches.bytes_per_token == cache.bytes_per_token
    ids = tokens(60)[0].numpy()

    def step(caches, row, past):
        feeds = {
            "input_ids": row[None],
            "past_lens": np.array([past]),
            "logits_positions": np.array([[len(row) - 1]]),
        }
        return runner.run(feeds, ("logits",), caches)["logits"].copy()

    whole = runner.new_caches(1, 64)
    step(whole, ids[:50], 0)
    want = step(whole, ids[50:], 50)
    restored = runner.new_caches(1, 64)
    restored.restore_row(0, whole.save_row(0, 50))
    assert np.array_equal(step(restored, ids[50:], 50), want)
    copied = runner.new_caches(2, 64)
    copied.restore_row(1, whole.save_row(0, 50))
    copied.copy_row(1, 0, 50)
    assert np.array_equal(step(copied.first(1), ids[50:], 50), want)
    step(whole, ids[::-1][:8].copy(), 50)  # 猜错的草稿写过的行，回滚之后被盖掉
    assert np.array_equal(step(whole, ids[50:], 50), want)


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        ("glm-dsa", "portable"),
        ("v32", "ort-cpu"),
        pytest.param("v32", "portable", marks=pytest.mark.slow),
        pytest.param("glm-dsa", "ort-cpu", marks=pytest.mark.slow),
    ],
)
def test_bundles_equal_transformers(saved, exported, variant: str, target: str):
    """DSA-7：verify 通过；从 12 个 token 续写 64 个，越过 index_topk，与 transformers 的 greedy 逐个相同。"""
    hf = saved(variant)[0]
    bundle = exported(variant, "mla+moe", target)
    report = deepseek_export.verify(bundle.path, levels=["op", "block", "model"])
    assert report.passed, report.first_failure
    prompt = tokens(12, seed=3)
    with torch.no_grad():
        want = hf.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
    model = deepseek_export.load(bundle.path)
    got = model.generate([prompt[0].tolist()], max_new_tokens=64, ignore_eos=True)
    assert got.token_ids == [want[0, 12:].tolist()]


def test_the_mask_of_the_baseline(exported):
    """DSA-7：MLA 关闭时每头 K/V 缓存加索引缓存，选择写成遮罩，仍与 transformers 相等。"""
    bundle = exported("glm-dsa", "baseline")
    names = {tensor.name for tensor in bundle.manifest.cache.tensors}
    assert names == {"k_cache", "v_cache", "index_cache"}
    report = deepseek_export.verify(bundle.path, levels=["model"])
    assert report.passed, report.first_failure


def config(variant: str, **changes: Any) -> ModelConfig:
    data = {**vars_of(variant), **changes}
    return parse_model_config({key: value for key, value in data.items() if value is not None}, variant)


def vars_of(variant: str) -> dict[str, Any]:
    family, changes = VARIANTS[variant]
    plain = {key: value for key, value in {**ODD, **changes}.items() if value is not None}
    return plain | {
        "model_type": family,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "torch_dtype": "bfloat16",
        **({"rope_theta": 10000.0} if "rope_parameters" not in plain else {}),
    }


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


def test_drafts_have_their_own_indexer(tmp_path: Path):
    """DSA-9：带 MTP 的小 GLM-5 导出 full，草稿与参考实现相等，起草与不起草的输出相同。"""
    from deepseek_export.checkpoint.synthetic import write_checkpoint

    path = write_checkpoint(tmp_path / "x", vars_of("glm-dsa"), dtype="float32", mtp=True)
    bundle = deepseek_export.export(path, tmp_path / "out", "full", target="ort-cpu")
    assert bundle.manifest.cache.of_layer(4)[1].name == "index_cache"
    report = deepseek_export.verify(bundle.path, levels=["block", "tokens"], steps=40)
    assert report.passed, report.first_failure


INT8_KEYS = ("dsa.index_cache_dtype=int8",)


@pytest.mark.parametrize(
    ("variant", "target", "more", "levels"),
    [
        ("glm-dsa", "ort-cpu", (), ["op", "model"]),
        pytest.param("glm-dsa", "portable", (), ["block", "tokens"], marks=pytest.mark.slow),
        pytest.param("v32", "portable", ("mla.cache_dtype=int8",), LEVELS, marks=pytest.mark.slow),
        pytest.param("v32", "ort-cpu", ("mla.cache_dtype=bfloat16",), LEVELS, marks=pytest.mark.slow),
    ],
)
def test_int8_index_keys(
    saved, tmp_path: Path, variant: str, target: str, more: tuple[str, ...], levels: list[str]
):
    """DSA-13：一行 di+3 字节，写进 manifest；verify 通过，选中的集合对没有舍入的另有一行；不开的时候图不变。"""
    path = saved(variant)[1].path
    bundle = deepseek_export.export(
        path, tmp_path / "out", "mla+moe", target=target, overrides=(*INT8_KEYS, *more)
    )
    entry = next(tensor for tensor in bundle.manifest.cache.tensors if tensor.name == "index_cache")
    assert (entry.width, entry.dtype or bundle.manifest.cache.dtype) == (24 + 3, "int8")
    report = deepseek_export.verify(bundle.path, levels=levels, steps=30)
    assert report.passed, report.first_failure
    measured = [case for case in report.cases if "选中的集合对没有舍入的" in case.name]
    assert bool(measured) == ("op" in levels)
    assert all(case.measure.calc_diff < 0.05 for case in measured)
    losses = [case for case in report.cases if case.level == "loss" and "int8 索引 key" in case.name]
    assert bool(losses) == ("model" in levels)


def test_int8_keys_are_refused_where_they_mean_nothing(saved, tmp_path: Path):
    """DSA-13：没有稀疏注意力的模型（DSX-E136）；TensorRT 的目标（DSX-E322）；transformers 的缓存（DSX-E805）。"""
    for variant, target, code in (("v3", "portable", "DSX-E136"), ("v32", "tensorrt", "DSX-E322")):
        with pytest.raises(DsxError) as caught:
            deepseek_export.export(
                saved(variant)[1].path, tmp_path / "out", "mla", target=target, overrides=INT8_KEYS
            )
        assert caught.value.code == code
    with pytest.raises(DsxError) as caught:
        deepseek_export.apply(saved("v32")[0], resolve_profile("mla", INT8_KEYS))
    assert caught.value.code == "DSX-E805"
    assert not (tmp_path / "out").exists()
