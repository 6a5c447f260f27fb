"""apply / restore 的承诺（HF-1 … HF-8）：与没有 apply 的同一个模型逐项对照。"""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import deepseek_export as dsx
from deepseek_export.integration.compat import cache_name
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tests.expansions import KvExpansions
from tests.models import build_model

pytestmark = pytest.mark.contract

PROFILES = ("mla", "moe", "mla+moe")
ABSORB = dsx.OptimizationProfile.model_validate({"mla": {"enabled": True, "form": "absorb"}})
#: 三条左填充的 prompt。
IDS = torch.randint(1, 200, (3, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
MASK[1, :2] = 0


@pytest.fixture(scope="module", params=[("v3-yarn", "sdpa"), ("v2-lite", "eager")], ids=lambda p: "-".join(p))
def pair(request):
    """同样权重的两个模型：一个永远不碰，一个由各测试 apply。"""
    variant, implementation = request.param
    models = build_model(variant), build_model(variant)
    for model in models:
        model.set_attn_implementation(implementation)
        model.generation_config.pad_token_id = 0
    return models


def generate(model, seed: int = 0, **options) -> torch.Tensor:
    torch.manual_seed(seed)
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 6, **options}
    return model.generate(**options)


def logits(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **options).logits


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return TOLERANCES["op", "float32"].accepts(measure(got.detach().numpy(), want.detach().numpy()))


def live_bytes() -> int:
    """存活的张量占多少字节，每块内存只算一次。"""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_all_off_leaves_the_model_untouched(pair):
    """HF-1"""
    plain, model = pair
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    assert dsx.apply(model, "baseline") is model
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert torch.equal(logits(model), logits(plain))


def test_parameters_are_shared(pair, tmp_path: Path):
    """HF-2"""
    plain, model = pair
    layout = [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
    used = live_bytes()
    dsx.apply(model, "mla+moe")
    assert live_bytes() == used
    assert [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()] == layout
    files = []
    for name, source in (("plain", plain), ("applied", model)):
        source.save_pretrained(tmp_path / name)
        files.append({p.name: hashlib.sha256(p.read_bytes()).digest() for p in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_restore_puts_the_original_back(pair):
    """HF-3"""
    plain, model = pair
    before = [(type(module), set(vars(module))) for module in dsx.restore(model).modules()]
    for profile in ("mla+moe", ABSORB, "moe"):
        dsx.apply(model, profile)
    assert dsx.restore(model) is model
    assert [(type(module), set(vars(module))) for module in model.modules()] == before
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, id="beam"),
        pytest.param({"do_sample": True, "top_k": 20, "temperature": 0.8}, id="sampling"),
        pytest.param({"cache_implementation": "static"}, id="static-cache"),
        pytest.param({"use_cache": False}, id="no-cache"),
        pytest.param({"repetition_penalty": 1.5, "eos_token_id": [7, 20, 33]}, id="processors"),
    ],
)
def test_generation_is_the_same(pair, profile, options):
    """HF-4：左填充的 batch。"""
    plain, model = pair
    dsx.apply(model, profile)
    assert torch.equal(generate(model, **options), generate(plain, **options))


def test_assisted_decoding_is_the_same(pair):
    """HF-4：草稿模型与 prompt lookup，batch 1。"""
    plain, model = pair
    dsx.apply(model, "mla+moe")
    one = {"input_ids": IDS[2:], "attention_mask": MASK[2:], "max_new_tokens": 10}
    want = generate(plain, **one)
    for assistant in ({"assistant_model": plain}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(generate(model, **one, **assistant), want)
        assert torch.equal(generate(plain, **one, **assistant), want)


def test_recorded_outputs_are_the_same(pair):
    """HF-4：hidden_states、attentions、router_logits 的个数、形状与值。"""
    plain, model = pair
    dsx.apply(model, ABSORB)
    flags = {"output_hidden_states": True}
    if plain.config._attn_implementation == "eager":
        flags["output_attentions"] = True
    if "router_logits" in plain._can_record_outputs:
        flags["output_router_logits"] = True
    with torch.no_grad():
        got, want = (m(IDS[2:], **flags) for m in (model, plain))
    for flag in flags:
        key = flag.removeprefix("output_")
        assert len(got[key]) == len(want[key]) > 0
        assert all(same(a, b) for a, b in zip(got[key], want[key], strict=True))


def test_decoding_does_not_expand_the_cache(pair):
    """HF-5：prefill 之后 再没用 kv_b_proj 展开过；没有 apply 的模型每步每层展开一次。"""
    plain, model = pair
    dsx.apply(model, "mla")
    counts = {}
    for name, source in (("plain", plain), ("applied", model)):
        with KvExpansions(source) as seen:
            generate(source)
        counts[name] = seen.rows
    layers = len(plain.model.layers)
    assert counts["applied"] == [IDS.shape[1]] * layers
    assert counts["plain"] == [IDS.shape[1] + step for step in range(6) for _ in range(layers)]


def test_the_cache_is_transformers_own(pair):
    """HF-5：同一个缓存，先由没有 apply 的模型填，再由 absorb 接着用，再还原接着用。"""
    plain, model = pair
    dsx.apply(model, ABSORB)
    want = logits(plain)
    cache = DynamicCache(config=plain.config)
    got = []
    with torch.no_grad():
        for source, start, stop in ((plain, 0, 5), (model, 5, 7), (plain, 7, 8), (model, 8, 9)):
            options = {cache_name(): cache, "attention_mask": MASK[:, :stop]}
            positions = (MASK.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            got.append(source(IDS[:, start:stop], position_ids=positions, **options).logits)
        want = plain(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits
    real = MASK.bool()
    assert same(torch.cat(got, 1)[real], want[real])
    assert cache.layers[0].keys.shape == (3, 1, 9, plain.config.kv_lora_rank)
    assert cache.layers[0].values.shape == (3, 1, 9, plain.config.qk_rope_head_dim)


@pytest.mark.parametrize("profile", [ABSORB, "moe"], ids=["absorb", "moe"])
def test_gradients_are_the_same(pair, profile):
    """HF-6"""
    plain, model = pair
    dsx.apply(model, profile)
    for source in pair:
        source.zero_grad()
        source(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        if got.grad is not None:
            assert same(got.grad, want.grad), name


def test_only_chosen_experts_run(pair):
    """HF-7：没选中的专家权重换成 NaN 也不影响结果；没有 token 时也成立。"""
    _, model = pair
    dsx.apply(model, "moe")
    experts = model.model.layers[-1].mlp.experts
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, model.config.hidden_size, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(7)])
    weights = torch.rand(7, 4, generator=generator)
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    want = moe_experts(x, ids.int(), weights, gate, up, experts.down_proj.detach())
    kept = experts.down_proj.detach()[6:].clone()
    with torch.no_grad():
        experts.down_proj[6:] = float("nan")
        got, empty = experts(x, ids, weights), experts(x[:0], ids[:0], weights[:0])
        experts.down_proj[6:] = kept
    assert same(got, want)
    assert empty.shape == (0, model.config.hidden_size)
