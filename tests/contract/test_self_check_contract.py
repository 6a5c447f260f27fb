"""没测过的 transformers 先自检（HF-19、PARITY-22）：一致就继续并说一句，不一致就拒绝并说差在哪里。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import deepseek_export as dsx
from deepseek_export.integration.causal_lm import DsxForCausalLM
from deepseek_export.integration.compat import model_classes
from deepseek_export.parity import self_check
from deepseek_export.parity.oracle import make_oracle
from tests.models import build_model

pytestmark = pytest.mark.contract

APPLIED = ("v3-yarn", "v3-no-q-lora", "v3-all-dense", "v2-lite", "v2-group", "v32", "glm-dsa")
PUBLISHED = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())


@pytest.fixture
def newer(monkeypatch, tmp_path):
    """装着的 transformers 成了没测过的；自检的结果记在一个空的缓存里。"""
    monkeypatch.setattr(self_check, "MAX_TRANSFORMERS", (5, 17))
    monkeypatch.setenv("DSX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DSX_NO_CACHE", raising=False)


def broken_at_layer_one(monkeypatch, kind):
    """transformers 换了这个类的算法：第 1 层的输出大了百分之一。"""
    original = kind.forward

    def forward(self, *arguments, **options):
        output, weights = original(self, *arguments, **options)
        return (output * 1.01 if self.layer_idx == 1 else output), weights

    monkeypatch.setattr(kind, "forward", forward)


def refused(model, profile="mla+moe") -> dsx.DsxError:
    """拒绝，而且模型原样不动。"""
    before = [type(module) for module in model.modules()]
    with pytest.raises(dsx.DsxError) as caught:
        dsx.apply(model, profile)
    assert caught.value.code == "DSX-E802"
    assert [type(module) for module in model.modules()] == before
    return caught.value


@pytest.mark.parametrize("variant", APPLIED)
def test_a_newer_version_that_agrees_goes_on_with_one_line(newer, variant):
    """HF-19"""
    model = build_model(variant)
    if type(model).__name__ not in model_classes():
        pytest.skip("这一版 transformers 没有这个模型类")
    with pytest.warns(UserWarning, match="没有测过.*自检一致") as said:
        dsx.apply(model, "mla+moe")
    assert len([one for one in said if "自检" in str(one.message)]) == 1
    assert any(hasattr(module, "dsx_form") for module in model.modules())


@pytest.mark.parametrize(
    ("variant", "kind"), [("v3-yarn", v3.DeepseekV3Attention), ("v2-lite", v2.DeepseekV2Attention)]
)
def test_changed_attention_is_refused_and_the_layer_named(newer, monkeypatch, variant, kind):
    """HF-19：transformers 换了算法，替换上去的没有跟着换。"""
    broken_at_layer_one(monkeypatch, kind)
    error = refused(build_model(variant))
    assert "model.layers.1.self_attn" in error.what
    assert "model.layers.0" not in error.what
    assert error.todo.startswith("pip install")


def test_changed_experts_are_refused_and_the_layer_named(newer, monkeypatch):
    """HF-19"""
    original = v3.DeepseekV3Experts.forward
    monkeypatch.setattr(v3.DeepseekV3Experts, "forward", lambda self, *args: original(self, *args) * 1.01)
    assert "model.layers.1.mlp" in refused(build_model("v3")).what


def test_a_renamed_part_is_refused_and_the_layer_named(newer, monkeypatch):
    """HF-19：替换上去的代码要用的东西没有了。"""
    original = v3.DeepseekV3Attention.__init__

    def renamed(self, config, layer_idx):
        original(self, config, layer_idx)
        self.scale = vars(self).pop("scaling")

    forward = v3.DeepseekV3Attention.forward

    def restored(self, *arguments, **options):
        self.scaling = self.scale
        try:
            return forward(self, *arguments, **options)
        finally:
            del self.scaling

    model = build_model("v3")
    monkeypatch.setattr(v3.DeepseekV3Attention, "__init__", renamed)
    monkeypatch.setattr(v3.DeepseekV3Attention, "forward", restored)
    error = refused(model)
    assert "model.layers.0.self_attn" in error.what
    assert "AttributeError" in error.what


def test_agreement_is_remembered_and_disagreement_is_not(newer, monkeypatch):
    """HF-19：一致过就不再比；不一致的修好了就能用。"""
    with monkeypatch.context() as patch:
        broken_at_layer_one(patch, v3.DeepseekV3Attention)
        refused(build_model("v3"))
    with pytest.warns(UserWarning, match="自检一致"):
        dsx.apply(build_model("v3"), "mla+moe")
    broken_at_layer_one(monkeypatch, v3.DeepseekV3Attention)
    with pytest.warns(UserWarning, match="自检一致"):
        dsx.apply(build_model("v3"), "mla+moe")


def test_all_off_needs_no_check(newer, monkeypatch):
    """HF-19：什么都不装，就没有什么要证明。"""
    broken_at_layer_one(monkeypatch, v3.DeepseekV3Attention)
    dsx.apply(build_model("v3"), "baseline")


def test_the_random_state_of_the_caller_is_untouched(newer):
    """HF-19"""
    model = build_model("v3")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="自检一致"):
        dsx.apply(model, "mla+moe")
    assert torch.equal(torch.rand(3), want)


def test_a_bundle_in_a_newer_version(newer, v3_bundle, monkeypatch):
    """HF-19：``DsxForCausalLM`` 的 generate 与不带缓存的 forward 相同，不同就拒绝。"""
    with pytest.warns(UserWarning, match="generate 自检一致"):
        DsxForCausalLM.from_pretrained(v3_bundle.path)
    monkeypatch.setattr(self_check, "_CACHE", self_check.DiskCache("other"))
    monkeypatch.setattr(DsxForCausalLM, "generate", lambda self, ids, **options: torch.cat([ids, ids], 1))
    with pytest.raises(dsx.DsxError, match="DSX-E802"):
        DsxForCausalLM.from_pretrained(v3_bundle.path)


def test_the_oracle_checks_itself(newer, saved, monkeypatch):
    """PARITY-22：一致就写进报告的说明，不一致就拒绝。"""
    _, checkpoint = saved("v3-yarn")
    _, notes = make_oracle(checkpoint, "float32")
    assert any("没有测过" in note for note in notes)
    monkeypatch.setattr(self_check, "_CACHE", self_check.DiskCache("other"))
    broken_at_layer_one(monkeypatch, v3.DeepseekV3Attention)
    with pytest.raises(dsx.DsxError, match="DSX-E603") as caught:
        make_oracle(checkpoint, "float32")
    assert "logits" in caught.value.what


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_model_has_a_small_one(name):
    """PARITY-22：每个家族发布的配置都缩得成能走的小模型，而且今天的 transformers 与参考模型一致。"""
    from transformers import CONFIG_MAPPING

    from deepseek_export.checkpoint.families import FAMILIES
    from deepseek_export.parity.oracle import small_difference

    family = PUBLISHED[name]["model_type"]
    kind = FAMILIES[family].transformers_type
    if kind not in CONFIG_MAPPING:
        pytest.skip("这一版 transformers 没有这个家族")
    config = CONFIG_MAPPING[kind].from_dict({**PUBLISHED[name], "model_type": kind})
    assert small_difference(self_check.shrunk(config) | {"model_type": family}) is None
