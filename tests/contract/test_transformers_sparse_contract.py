"""``apply`` 在稀疏注意力的模型上（HF-18）：与没有 apply 的同一个模型逐项对照，长度低于、等于、高于名额。"""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, StaticCache

import deepseek_export as dsx
from deepseek_export.integration import compat
from deepseek_export.integration.compat import cache_name
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tests.expansions import KvExpansions
from tests.models import build_model

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(not compat.has_sparse_models(), reason="这一版 transformers 没有稀疏注意力的模型类"),
]

SPARSE, FORMS = ("v32", "glm-dsa"), ("absorb", "auto")
#: 变体的 ``index_topk``。
TOPK = 24
IDS = torch.randint(1, 200, (2, 60), generator=torch.Generator().manual_seed(5))


def profile(form: str, moe: bool = False) -> dsx.OptimizationProfile:
    values = {"mla": {"enabled": True, "form": form}, "moe": {"enabled": moe}}
    return dsx.OptimizationProfile.model_validate(values)


@functools.cache
def models(variant: str, implementation: str):
    """同样权重的两个模型：一个永远不碰，一个由各测试 apply。"""
    pair = build_model(variant), build_model(variant)
    for model in pair:
        model.set_attn_implementation(implementation)
        model.generation_config.pad_token_id = 0
    return pair


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return TOLERANCES["logits", "float32"].accepts(measure(got.detach().numpy(), want.detach().numpy()))


def mask_of(length: int, padded: int) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padded] = 0
    return mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", SPARSE)
def test_logits_below_at_and_above_the_slots(variant: str, form: str, implementation: str):
    """HF-18：一次走完，有填充与没有；看得见东西的行都相同。"""
    plain, model = models(variant, implementation)
    dsx.apply(model, profile(form, moe=True))
    for length in (TOPK - 1, TOPK, TOPK + 1, 60):
        for padded in (0, 7):
            mask = mask_of(length, padded)
            options = {"attention_mask": mask, "position_ids": positions_of(mask)}
            with torch.no_grad():
                got, want = (m(IDS[:, :length], **options).logits for m in (model, plain))
            assert same(got[mask.bool()], want[mask.bool()]), (length, padded)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", SPARSE)
def test_chunks_over_one_cache(variant: str, form: str, kind: str):
    """HF-18：分块 prefill、解码，越过名额；缓存（含索引 key）与 transformers 自己写的相同，换回去接着用也行。"""
    plain, model = models(variant, "sdpa")
    dsx.apply(model, profile(form))
    mask = mask_of(60, 5)
    caches, outputs = [], []
    for source in (plain, model):
        config = source.config
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=64)
        found = []
        with torch.no_grad():
            for start, stop in pairwise((0, 20, 23, 24, 25, 26, 40, 41, 60)):
                # 最后一段由没有 apply 的模型走：缓存是同一种东西。
                runs = plain if stop == 60 else source
                options = {cache_name(): cache, "attention_mask": mask[:, :stop]}
                positions = positions_of(mask)[:, start:stop]
                found.append(runs(IDS[:, start:stop], position_ids=positions, **options).logits)
        caches.append(cache)
        outputs.append(torch.cat(found, 1)[mask.bool()])
    assert same(outputs[1], outputs[0])
    for got, want in zip(caches[1].layers, caches[0].layers, strict=True):
        assert (got.indexer_keys is None) == (want.indexer_keys is None)
        if want.indexer_keys is not None:
            assert same(got.indexer_keys[mask_rows(mask, got)], want.indexer_keys[mask_rows(mask, want)])


def mask_rows(mask: torch.Tensor, layer) -> torch.Tensor:
    """缓存里真的 token 的行：静态的后面还有空行。"""
    rows = torch.zeros(layer.indexer_keys.shape[:2], dtype=torch.bool)
    rows[:, : mask.shape[1]] = mask.bool()
    return rows


@pytest.mark.parametrize("variant", SPARSE)
def test_generation_is_the_same(variant: str):
    """HF-18：长短不一的 batch 起步在名额以下、越过它；greedy、beam、采样、静态缓存、prompt lookup。"""
    plain, model = models(variant, "sdpa")
    dsx.apply(model, "mla+moe")
    prompt = {"input_ids": IDS[:, :18], "attention_mask": mask_of(18, 6), "max_new_tokens": 16}
    one = {"input_ids": IDS[1:, :18], "attention_mask": mask_of(18, 0)[1:], "max_new_tokens": 16}
    for options in (
        prompt,
        prompt | {"num_beams": 2},
        prompt | {"do_sample": True, "top_k": 20},
        prompt | {"cache_implementation": "static"},
        one | {"prompt_lookup_num_tokens": 2},
    ):
        tokens = []
        for source in (model, plain):
            torch.manual_seed(0)
            tokens.append(source.generate(**options))
        assert torch.equal(*tokens), options


@pytest.mark.parametrize("variant", SPARSE)
def test_only_chosen_rows_are_read(variant: str, monkeypatch):
    """HF-18：解码不展开缓存；名额不够时，每层每个 query 恰好收集 index_topk 行，名额够时一行也不收集、不打分。"""
    from deepseek_export.integration import sparse_attention

    _, model = models(variant, "sdpa")
    dsx.apply(model, profile("absorb"))
    gathered, gather = [], sparse_attention.gather_rows
    monkeypatch.setattr(
        sparse_attention,
        "gather_rows",
        lambda cache, indices: gathered.append(tuple(indices.shape)) or gather(cache, indices),
    )
    scored = []
    hooks = [
        layer.self_attn.indexer.wq_b.register_forward_hook(lambda *_: scored.append(1))
        for layer in model.model.layers
        if layer.self_attn.indexer is not None
    ]
    with torch.no_grad(), KvExpansions(model) as seen:
        model(IDS[:, :TOPK])
        assert (gathered, scored) == ([], [])
        model(IDS)
    assert seen.rows == []
    assert len(scored) == len(hooks)
    assert {shape[::2] for shape in gathered} == {(2, TOPK)}
    assert sum(shape[1] for shape in gathered) == IDS.shape[1] * len(model.model.layers)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("variant", SPARSE)
def test_blocks_of_queries_change_nothing(variant: str, monkeypatch):
    """HF-18：打分与收集分批走，一次一个 query 也一样。"""
    from deepseek_export.integration import sparse_attention

    plain, model = models(variant, "sdpa")
    dsx.apply(model, profile("absorb"))
    monkeypatch.setattr(sparse_attention, "_BLOCK_VALUES", 1)
    with torch.no_grad():
        assert same(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("variant", SPARSE)
def test_restore_and_gradients(variant: str):
    """HF-18：梯度与没有 apply 时相同；restore 之后每个模块的类与属性如初，输出逐位相同。"""
    plain, model = models(variant, "sdpa")
    dsx.restore(model)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    dsx.apply(model, profile("absorb", moe=True))
    for source in (plain, model):
        source.zero_grad()
        source(IDS, labels=IDS).loss.backward()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        assert got.grad is None or same(got.grad, want.grad), name
    dsx.restore(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_cannot_be_done_is_refused(monkeypatch):
    """HF-18：MTP 没有索引 key 的缓存（DSX-E805）；没有测过这两个模型类的旧版按 DSX-E803 拒绝，写明支持哪些。"""
    _, model = models("v32", "sdpa")
    before = [type(module) for module in dsx.restore(model).modules()]
    with pytest.raises(dsx.DsxError) as caught:
        dsx.apply(model, "full")
    assert caught.value.code == "DSX-E805"
    assert [type(module) for module in model.modules()] == before
    monkeypatch.setattr(compat.metadata, "version", lambda name: "5.23.1")
    with pytest.raises(dsx.DsxError) as caught:
        dsx.apply(model, "mla")
    assert caught.value.code == "DSX-E803"
    assert "DeepseekV32ForCausalLM" not in caught.value.todo
