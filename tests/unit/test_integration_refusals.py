"""apply 拒绝什么：每一种都有码，而且模型原样不动（HF-8）。"""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, LlamaConfig

import deepseek_export as dsx
from deepseek_export.integration.compat import require_transformers
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.version import MIN_TRANSFORMERS
from tests.expansions import KvExpansions
from tests.models import build_model

pytestmark = pytest.mark.unit

ABSORB = dsx.OptimizationProfile.model_validate({"mla": {"enabled": True, "form": "absorb"}})


@pytest.fixture
def model():
    return build_model("v3")


def refused(code: str, model, profile="mla+moe", **options) -> str:
    """报这个码，且没有任何模块被替换。"""
    classes = [type(module) for module in model.modules()]
    with pytest.raises(dsx.DsxError) as caught:
        dsx.apply(model, profile, **options)
    assert caught.value.code == code
    assert [type(module) for module in model.modules()] == classes
    return caught.value.what


def test_transformers_is_missing(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(dsx.DsxError, match="DSX-E801"):
        require_transformers()


@pytest.mark.parametrize("version", ["4.57.6", f"{MIN_TRANSFORMERS[0]}.{MIN_TRANSFORMERS[1] - 1}.2"])
def test_transformers_is_too_old(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(dsx.DsxError, match="DSX-E802") as caught:
        require_transformers()
    assert version in caught.value.what


def test_other_model_classes(model):
    shape = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16, "num_hidden_layers": 1}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2))
    assert "LlamaForCausalLM" in refused("DSX-E803", llama)
    subclass = type("Mine", (type(model),), {})
    model.__class__ = subclass
    assert "Mine" in refused("DSX-E803", model)
    with pytest.raises(dsx.DsxError, match="DSX-E803"):
        dsx.restore(nn.Linear(2, 2))


def test_unsupported_config_fields(model):
    model.config.moe_layer_freq = 2
    assert "moe_layer_freq" in refused("DSX-E105", model)


@pytest.mark.parametrize("name", ["self_attn", "self_attn.kv_b_proj", "mlp.experts"])
def test_wrapped_forward(model, name):
    module = model.get_submodule(f"model.layers.1.{name}")
    module.forward = module.forward
    assert f"layers.1.{name} " in refused("DSX-E804", model)


def test_replaced_linear(model):
    class Quantised(nn.Linear):
        pass

    model.model.layers[0].self_attn.kv_b_proj.__class__ = Quantised
    assert "Quantised" in refused("DSX-E804", model)
    assert dsx.apply(model, "moe") is model


class LowRank(nn.Module):
    """PEFT 的 LoRA 层的样子：包着原来的 Linear，加一个低秩的改动。"""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Tagged(torch.Tensor):
    """torchao 的做法：层还是 nn.Linear，权重换成张量的子类。"""


def double(module, args, output):
    return 2 * output


def double_input(module, args):
    return (2 * args[0],)


def wrap_forward(attention) -> None:
    original = attention.kv_b_proj.forward
    attention.kv_b_proj.forward = lambda x: 2 * original(x)


def tag_weight(attention) -> None:
    weight = attention.kv_b_proj.weight.detach().as_subclass(Tagged)
    attention.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)


def quantize(attention) -> None:
    torch.ao.quantization.quantize_dynamic(attention, {nn.Linear}, inplace=True)


#: apply 之后还能把 kv_b_proj 变成别的东西的办法。
CHANGES = {
    "lora": lambda attention: setattr(attention, "kv_b_proj", LowRank(attention.kv_b_proj)),
    "forward-hook": lambda attention: attention.kv_b_proj.register_forward_hook(double),
    "forward-pre-hook": lambda attention: attention.kv_b_proj.register_forward_pre_hook(double_input),
    "backward-hook": lambda attention: attention.kv_b_proj.register_full_backward_hook(lambda *_: None),
    "instance-forward": wrap_forward,
    "parametrization": lambda attention: parametrize.register_parametrization(
        attention.kv_b_proj, "weight", Doubled()
    ),
    "pruning": lambda attention: prune.l1_unstructured(attention.kv_b_proj, "weight", 0.5),
    "class": lambda attention: setattr(attention.kv_b_proj, "__class__", type("Mine", (nn.Linear,), {})),
    "bias": lambda attention: setattr(
        attention.kv_b_proj, "bias", nn.Parameter(torch.ones(attention.kv_b_proj.out_features))
    ),
    "weight-subclass": tag_weight,
    "quantize-dynamic": quantize,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_projection_changed_after_apply(model, change):
    """HF-15：prefill 走的是 transformers 的代码，照常；要走 absorb 的那一步拒绝，不悄悄丢掉改动。restore 之后照常。"""
    plain = build_model("v3")
    dsx.apply(model, "mla")
    for each in (model, plain):
        torch.manual_seed(0)
        change(each.model.layers[1].self_attn)
    ids = torch.randint(1, 200, (2, 6), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    with pytest.raises(dsx.DsxError, match="DSX-E804") as caught:
        model.generate(ids, **options)
    assert "第 1 层的 kv_b_proj" in caught.value.what
    assert "restore(model)" in caught.value.todo
    with pytest.raises(dsx.DsxError, match="DSX-E804"):
        dsx.apply(model, "mla")
    dsx.restore(model)
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_a_new_weight_after_apply_is_used(model):
    """HF-15：换掉的只是权重的值或 Parameter 本身，absorb 用新的。"""
    plain = build_model("v3")
    dsx.apply(model, ABSORB)
    ids = torch.randint(1, 200, (2, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = plain(ids).logits
        for each in (model, plain):
            linear = each.model.layers[1].self_attn.kv_b_proj
            linear.weight = nn.Parameter(linear.weight.flip(0).contiguous())
        got, want = model(ids).logits, plain(ids).logits
    assert not torch.equal(want, before)
    assert TOLERANCES["logits", "float32"].accepts(measure(got.numpy(), want.numpy()))


def test_experts_changed_after_apply(model):
    """HF-15：专家的权重被量化，用到时拒绝；hook、换掉的 Parameter、换掉的激活照常。"""
    plain = build_model("v3")
    dsx.apply(model, "moe")
    ids = torch.randint(1, 200, (2, 6), generator=torch.Generator().manual_seed(3))
    for each in (model, plain):
        experts = each.model.layers[1].mlp.experts
        experts.register_forward_hook(double)
        experts.act_fn = nn.GELU()
        experts.down_proj = nn.Parameter(experts.down_proj.flip(0).contiguous())
    with torch.no_grad():
        got, want = model(ids).logits, plain(ids).logits
        assert TOLERANCES["logits", "float32"].accepts(measure(got.numpy(), want.numpy()))
        experts = model.model.layers[1].mlp.experts
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(dsx.DsxError, match="DSX-E804") as caught:
            model(ids)
    assert "float8" in caught.value.what


def test_parametrized_modules_are_named(model):
    """HF-15：参数化给模块换了类：装与退都认不出它，不悄悄跳过；权重照常每次现取。"""
    plain = build_model("v3")
    dsx.apply(model, "moe")
    for each in (model, plain):
        experts = each.model.layers[1].mlp.experts
        parametrize.register_parametrization(experts, "down_proj", Doubled())
    ids = torch.randint(1, 200, (2, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, want = model(ids).logits, plain(ids).logits
    assert TOLERANCES["logits", "float32"].accepts(measure(got.numpy(), want.numpy()))
    for call in (dsx.restore, lambda each: dsx.apply(each, "mla"), lambda each: dsx.apply(each, "moe")):
        with pytest.raises(dsx.DsxError, match="DSX-E804") as caught:
            call(model)
        assert "layers.1.mlp.experts" in caught.value.what
    refused("DSX-E804", plain, "moe")


def test_experts_that_are_not_here(model):
    experts = model.model.layers[1].mlp.experts
    experts._is_expert_parallel = True
    refused("DSX-E804", model)
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "float8" in refused("DSX-E804", model)


def test_attention_implementation(model):
    model.config._attn_implementation = "flex_attention"
    assert "flex_attention" in refused("DSX-E804", model)


def test_a_mask_that_came_later(model):
    """apply 之后又换了 attention 实现：遮罩的形状不认识，不猜。"""
    dsx.apply(model, ABSORB)
    attention = model.model.layers[0].self_attn
    x = torch.zeros(1, 1, model.config.hidden_size)
    for mask in (torch.ones(1, 5), object()):
        with pytest.raises(dsx.DsxError, match="DSX-E804"):
            attention(hidden_states=x, position_embeddings=None, attention_mask=mask)


@pytest.mark.parametrize(
    "values",
    [
        {"mla": {"enabled": True, "cache_dtype": "float16"}},
        {"mla": {"enabled": True}, "fallback": {"on_drift": "naive"}},
    ],
    ids=["cache_dtype", "on_drift"],
)
def test_settings_that_mean_nothing_here(model, values):
    refused("DSX-E805", model, dsx.OptimizationProfile.model_validate(values))


def test_naive_form_is_transformers_itself(model):
    naive = dsx.OptimizationProfile.model_validate({"mla": {"enabled": True, "form": "naive"}})
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in dsx.apply(model, naive).modules()] == classes


def test_dropout_in_training_keeps_transformers_code(model):
    """训练时 dropout 打开，absorb 让位。"""
    dsx.apply(model, ABSORB)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.ones(1, 3, dtype=torch.long)
    with KvExpansions(model) as seen:
        model.train()(ids)
    assert seen.rows == [3] * len(model.model.layers)
    with KvExpansions(model) as seen:
        model.eval()(ids)
    assert not seen.rows


def test_arguments_that_change_the_scores_keep_transformers_code(model):
    """``is_causal=False`` 之类只有 transformers 的注意力函数认得，absorb 让位，结果相同。"""
    plain = build_model("v3")
    ids = torch.randint(1, 200, (2, 5), generator=torch.Generator().manual_seed(3))
    for each in (model, plain):
        each.set_attn_implementation("sdpa")
    dsx.apply(model, ABSORB)
    causal = plain(ids).logits
    want = plain(ids, is_causal=False).logits
    assert not torch.equal(want, causal)
    assert torch.equal(model(ids, is_causal=False).logits, want)
    for each in (model, plain):
        for layer in each.model.layers:
            layer.self_attn.is_causal = False
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_unknown_profile(model):
    refused("DSX-E001", model, "mlaa")
