"""apply 与没有 apply 的同一个模型，走遍 transformers 的缓存 × attention 实现 × 形式 × 填充（HF-14）。

缓存的种类不是手写的：``cache_utils`` 里每个缓存层的类、``generate`` 认得的每个 ``cache_implementation``，装的是哪一版就走哪一版的。
没有 apply 的模型自己都跑不了的（少一个依赖、要 GPU），apply 过的必须以同样的异常失败。
"""

from __future__ import annotations

import functools
import inspect
from itertools import pairwise, product
from typing import Any, get_args

import pytest
import torch
from transformers import Cache, cache_utils
from transformers.generation import configuration_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deepseek_export as dsx
from deepseek_export.integration.attention import ATTENTION_IMPLEMENTATIONS, AbsorbForm
from deepseek_export.integration.compat import cache_name
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from tests.models import build_model

pytestmark = pytest.mark.contract

#: 变体 → 相对它的改动；最后一个的头比 latent 宽，``auto`` 连 prefill 也走 absorb。
MODELS: dict[str, tuple[str, dict]] = {
    "v3": ("v3-yarn", {}),
    "v2": ("v2-lite", {}),
    "wide": ("v3", {"kv_lora_rank": 16}),
}
FORMS = get_args(AbsorbForm)
PADDINGS = ("no-mask", "ones", "left", "right")
#: 一次次喂进去的列：prompt、分块 prefill 的第二块、解码、接着用同一个缓存再喂一段、再解码。
EDGES = (0, 5, 8, 9, 10, 14, 15)
CAPACITY, WINDOW = 24, 6
IDS = torch.randint(1, 200, (2, EDGES[-1]), generator=torch.Generator().manual_seed(3))


def layer_classes() -> dict[str, type]:
    """``cache_utils`` 里所有能造出来的缓存层。"""
    found, queue = {}, [cache_utils.CacheLayerMixin]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__ == cache_utils.__name__ and not inspect.isabstract(kind):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))


LAYERS = layer_classes()
#: 装在任何一台机器上都跑得了的，不能因为“没有 apply 的也跑不了”而漏掉。
ALWAYS = {"DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"}


def new_cache(kind: str, layers: int) -> Cache:
    sizes = {"max_cache_len": CAPACITY, "sliding_window": WINDOW}
    accepted = inspect.signature(LAYERS[kind].__init__).parameters
    given = {name: value for name, value in sizes.items() if name in accepted}
    return Cache(layers=[LAYERS[kind](**given) for _ in range(layers)])


def padding_mask(padding: str, columns: int) -> torch.Tensor | None:
    """[B, 列数]；填充在第一段里，右填充的是第一段的末尾。"""
    if padding == "no-mask":
        return None
    mask = torch.ones(len(IDS), columns, dtype=torch.long)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, 3 : EDGES[1]] = 0
    return mask


@functools.cache
def plain(name: str, implementation: str):
    return built(name, implementation)


def built(name: str, implementation: str):
    variant, changes = MODELS[name]
    model = build_model(variant, **changes)
    model.set_attn_implementation(implementation)
    model.generation_config.pad_token_id = 0
    return model


def applied(name: str, implementation: str, form: str):
    model = _other(name, implementation)
    return dsx.apply(model, dsx.OptimizationProfile.model_validate({"mla": {"enabled": True, "form": form}}))


@functools.cache
def _other(name: str, implementation: str):
    return built(name, implementation)


def outcome(call) -> Any:
    """结果，或失败时的异常类。"""
    try:
        with torch.no_grad():
            return call()
    except Exception as error:
        return type(error)


def logits(model, kind: str, padding: str) -> list[torch.Tensor]:
    """一段段喂完，每段的 logits。"""
    cache, out = new_cache(kind, model.config.num_hidden_layers), []
    for start, stop in pairwise(EDGES):
        options: dict[str, Any] = {cache_name(): cache, "attention_mask": padding_mask(padding, stop)}
        if options["attention_mask"] is not None:
            options["position_ids"] = (options["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, start:stop]
        out.append(model(IDS[:, start:stop], **options).logits)
    return out


@functools.cache
def plain_logits(name: str, implementation: str, kind: str, padding: str):
    return outcome(lambda: logits(plain(name, implementation), kind, padding))


def check_grid(name: str, implementation: str, form: str, kind: str, padding: str) -> None:
    want = plain_logits(name, implementation, kind, padding)
    got = outcome(lambda: logits(applied(name, implementation, form), kind, padding))
    if isinstance(want, type):
        assert kind not in ALWAYS
        assert got is want
        return
    assert not isinstance(got, type), got
    for step, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1)), f"第 {step} 段"
        assert TOLERANCES["logits", "float32"].accepts(measure(mine.numpy(), theirs.numpy())), f"第 {step} 段"


GRID = list(product(ATTENTION_IMPLEMENTATIONS, FORMS, LAYERS, PADDINGS))


@pytest.mark.parametrize(
    ("implementation", "form", "kind", "padding"), GRID, ids=["-".join(case) for case in GRID]
)
def test_every_cache_gives_the_same_logits(implementation, form, kind, padding):
    """HF-14：缓存层 × 实现 × 形式 × 填充。"""
    check_grid("v3", implementation, form, kind, padding)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "v3"])
@pytest.mark.parametrize(
    ("implementation", "form", "kind", "padding"), GRID, ids=["-".join(case) for case in GRID]
)
def test_every_cache_gives_the_same_logits_on_the_other_models(name, implementation, form, kind, padding):
    """HF-14：同上，V2 与头比 latent 宽的模型。"""
    check_grid(name, implementation, form, kind, padding)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", sorted(ALWAYS))
def test_the_plain_caches_on_every_model(name, implementation, form, kind):
    """HF-14：没有遮罩、形状最容易骗人的那一种，三个模型都走。"""
    check_grid(name, implementation, form, kind, "no-mask")


@pytest.mark.parametrize("padding", ["ones", "left"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
def test_generate_with_every_cache_implementation(implementation, form, padding):
    """HF-14：``generate(cache_implementation=...)``，greedy 的 token 与每步的 logits。"""
    columns = 7
    options = {
        "input_ids": IDS[:, :columns],
        "attention_mask": padding_mask(padding, columns),
        "max_new_tokens": 5,
        "cache_implementation": implementation,
        "return_dict_in_generate": True,
        "output_logits": True,
        "disable_compile": True,
    }
    if implementation == "quantized":
        options["cache_config"] = {"backend": "fp8"}
    got, want = (
        outcome(lambda model=model: model.generate(**options))
        for model in (applied("v3", "sdpa", form), plain("v3", "sdpa"))
    )
    if isinstance(want, type):
        assert implementation not in {"static", "dynamic"}
        assert got is want
        return
    assert not isinstance(got, type), got
    assert torch.equal(got.sequences, want.sequences)
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        assert TOLERANCES["logits", "float32"].accepts(measure(mine.numpy(), theirs.numpy()))


def test_both_names_of_the_cache():
    """HF-14：直接调用一层时缓存用新名、旧名都认，不当成没有缓存。"""
    model = applied("v3", "sdpa", "absorb")
    attention, config = model.model.layers[0].self_attn, model.config
    x = torch.randn(1, 4, config.hidden_size, generator=torch.Generator().manual_seed(3))
    outputs = []
    for name in ("past_key_values", cache_name()):
        cache = new_cache("DynamicLayer", config.num_hidden_layers)
        for start, stop in ((0, 3), (3, 4)):
            position_embeddings = model.model.rotary_emb(x, torch.arange(start, stop)[None])
            with torch.no_grad():
                out, _ = attention(
                    x[:, start:stop], position_embeddings, attention_mask=None, **{name: cache}
                )
        assert cache.get_seq_length() == 4
        outputs.append(out)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("implementation", sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}))
def test_every_other_attention_implementation_is_refused(implementation):
    """HF-8、HF-14：transformers 的每个 attention 实现，要么在上面的格子里，要么拒绝；apply 之后才换的也一样。"""
    model = applied("v3", "eager", "absorb")
    model.config._attn_implementation = implementation
    try:
        if implementation in ATTENTION_IMPLEMENTATIONS:
            model(IDS)
            return
        attention = model.model.layers[0].self_attn
        with pytest.raises(dsx.DsxError, match="DSX-E804"):
            attention(torch.zeros(1, 1, model.config.hidden_size), position_embeddings=None)
        with pytest.raises(dsx.DsxError, match="DSX-E804"):
            dsx.apply(model, "mla")
    finally:
        model.config._attn_implementation = "eager"
