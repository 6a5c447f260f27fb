"""apply 拒绝什么：每一种都有码，而且模型原样不动（HF-8）。"""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import deepseek_export as dsx
from deepseek_export.integration.compat import MAX_TRANSFORMERS, UNTESTED, require_transformers
from deepseek_export.parity.oracle import MIN_TRANSFORMERS
from tests.models import build_model

pytestmark = pytest.mark.unit


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
    monkeypatch.setenv(UNTESTED, "1")
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(dsx.DsxError, match="DSX-E802") as caught:
        require_transformers()
    assert version in caught.value.what


def test_transformers_is_untested(monkeypatch):
    newer = f"{MAX_TRANSFORMERS[0]}.{MAX_TRANSFORMERS[1] + 1}.0.dev0"
    monkeypatch.setattr(metadata, "version", lambda name: newer)
    monkeypatch.delenv(UNTESTED, raising=False)
    with pytest.raises(dsx.DsxError, match="DSX-E802") as caught:
        require_transformers()
    assert UNTESTED in caught.value.todo
    monkeypatch.setenv(UNTESTED, "1")
    require_transformers()


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
    dsx.apply(model, "mla")
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
    absorb = dsx.OptimizationProfile.model_validate({"mla": {"enabled": True, "form": "absorb"}})
    dsx.apply(model, absorb)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    calls = []
    hook = model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.ones(1, 3, dtype=torch.long)
    model.train()(ids)
    assert calls
    calls.clear()
    model.eval()(ids)
    assert not calls
    hook.remove()


def test_unknown_profile(model):
    refused("DSX-E001", model, "mlaa")
