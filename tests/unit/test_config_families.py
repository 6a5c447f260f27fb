"""checkpoint/config.py：各个家族发布的 config.json，厂商自己的字段名，与 transformers 读的一样。"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from deepseek_export.checkpoint import load_model_config, parse_model_config
from tests.configs import (
    AXK1,
    GLM,
    KIMI,
    MINICPM,
    SARVAM,
    V2,
    V2_LITE,
    V3,
    YOUTU,
    edit,
    refused,
    yarn_scaling,
)

pytestmark = pytest.mark.unit


def test_published_v3():
    config = parse_model_config(V3, "V3")
    assert (config.rope_layout, config.group_score, config.num_mtp_layers) == ("deinterleaved", "top2_sum", 1)
    assert (config.num_moe_layers, config.is_moe_layer(2), config.is_moe_layer(61)) == (58, False, True)
    assert (config.latent_cache_values, config.expanded_cache_values) == (576, 128 * 320)
    assert config.softmax_scale / 192**-0.5 == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert config.rope.cos_sin_scale == 1.0
    assert config.eos_token_ids == (1,)


def test_published_v2():
    lite, full = parse_model_config(V2_LITE, "lite"), parse_model_config(V2, "v2")
    assert (lite.rope_layout, lite.q_lora_rank, lite.group_score) == ("interleaved", None, "none")
    assert (lite.scoring_func, lite.n_group, lite.num_mtp_layers) == ("softmax", 1, 0)
    assert lite.softmax_scale / 192**-0.5 == pytest.approx(1.59, abs=0.01)
    assert (full.group_score, full.n_group, full.topk_group) == ("max", 8, 3)


def test_v2_defaults_follow_transformers():
    drop = ("topk_method", "scoring_func", "n_group", "topk_group", "norm_topk_prob")
    config = parse_model_config(edit(V2_LITE, *drop), "x")
    assert (config.topk_method, config.scoring_func, config.norm_topk_prob) == ("greedy", "softmax", False)


def test_published_kimi_and_glm():
    """V3 的路由与注意力，数值不同；GLM 不写 mlp_layer_types 时第一层 dense。"""
    kimi, glm = parse_model_config(KIMI, "kimi"), parse_model_config(GLM, "glm")
    for config in (kimi, glm):
        assert (config.rope_layout, config.group_score, config.n_group) == ("deinterleaved", "top2_sum", 1)
        assert config.latent_cache_values == 576
    assert (kimi.num_moe_layers, kimi.n_routed_experts, kimi.num_mtp_layers) == (60, 384, 0)
    assert (glm.num_moe_layers, glm.v_head_dim, glm.num_mtp_layers) == (46, 256, 1)


def test_published_dense_families():
    """没有 MoE：一层都不是；MiniCPM3 省略的字段取配置类的缺省，v_head_dim 由宽度推出。"""
    youtu, mini = parse_model_config(YOUTU, "youtu"), parse_model_config(MINICPM, "minicpm3")
    for config in (youtu, mini):
        assert (config.num_moe_layers, config.n_routed_experts, config.tie_word_embeddings) == (0, 0, True)
        assert not any(config.is_moe_layer(i) for i in range(config.num_hidden_layers + 1))
    assert (youtu.rope_layout, youtu.embed_scale, youtu.logits_divisor) == ("deinterleaved", 1.0, 1.0)
    assert (mini.rope_layout, mini.v_head_dim, mini.attention_bias) == ("half", 64, False)
    assert (mini.embed_scale, mini.logits_divisor) == (12.0, 10.0)
    assert mini.residual_scale == pytest.approx(1.4 / math.sqrt(62))
    plain = parse_model_config(edit(MINICPM, scale_depth=None, dim_model_base=None), "x")
    assert (plain.residual_scale, plain.logits_divisor) == (1.0, 1.0)


def test_published_sarvam_uses_its_own_names():
    """字段另起了名字、rope 叫 deepseek_yarn、head_dim 是潜缓存的宽度、没写分组：就是没有 q_lora、不分组的 V3。"""
    config = parse_model_config(SARVAM, "sarvam")
    names = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
    usual = {
        names.get(key, key): value for key, value in SARVAM.items() if key not in ("head_dim", "q_head_dim")
    }
    usual |= {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": True}
    usual |= {"attention_bias": False, "use_qk_norm": False, "rope_scaling": yarn_scaling(1.0)}
    only_here = ("default_theta", "embedding_dropout", "output_dropout", "moe_router_enable_expert_bias")
    v3 = parse_model_config(edit(usual, *only_here, model_type="deepseek_v3"), "v3")
    assert dataclasses.replace(config, family="deepseek_v3") == v3
    assert (config.rope.rope_type, config.qk_head_dim, config.num_moe_layers) == ("yarn", 192, 31)
    assert parse_model_config(edit(SARVAM, moe_shared_expert_intermediate_size=2048), "x") == config


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("DSX-E105", {"head_dim": 575}),
        ("DSX-E105", {"q_head_dim": 576}),
        ("DSX-E105", {"num_experts": 128, "n_routed_experts": 64}),
        ("DSX-E105", {"num_experts": 128, "num_local_experts": 64}),
        ("DSX-E105", {"moe_shared_expert_intermediate_size": 4096}),
        ("DSX-E105", {"moe_router_enable_expert_bias": False}),
        ("DSX-E105", {"use_qk_norm": 1}),
        ("DSX-E105", {"output_dropout": 0.1}),
        ("DSX-E107", {"rope_scaling": yarn_scaling(1.0) | {"type": "telechat3-yarn"}}),
        ("DSX-E107", {"rope_scaling": yarn_scaling(1.0) | {"type": "deepseek_yarn", "rope_type": "default"}}),
        ("DSX-E109", {"topk_method": "greedy"}),
    ],
)
def test_sarvam_refuses_what_it_does_not_know(code, change):
    """别名与正名矛盾、它的字段取别的值、别的 rope：一律拒绝。"""
    refused(code, edit(SARVAM, **change))


def test_names_of_one_family_are_not_taken_by_another():
    """Sarvam 的名字只有 sarvam_mla 认：别的实现不读它们，读法也就未必相同。"""
    refused("DSX-E104", edit(V3, num_shared_experts=1))
    refused("DSX-E104", edit(V3, moe_router_enable_expert_bias=True))
    refused("DSX-E105", edit(V3, head_dim=576))
    refused("DSX-E105", edit(V3, use_qk_norm=True))
    refused("DSX-E107", edit(V3, rope_scaling=yarn_scaling(1.0) | {"type": "deepseek_yarn"}))


def test_published_axk1():
    """V3 的路由与注意力；dense 层由 first_k_dense_replace 或 mlp_layer_types 给出，两者矛盾的拒绝。"""
    config = parse_model_config(AXK1, "axk1")
    assert (config.group_score, config.n_group, config.topk_group) == ("top2_sum", 8, 4)
    assert (config.num_moe_layers, config.post_mlp_norm, config.router_bias) == (60, True, False)
    types = ["dense"] * 2 + ["sparse"] * 59
    listed = edit(AXK1, "first_k_dense_replace", mlp_layer_types=types)
    assert parse_model_config(listed, "x").num_moe_layers == 59
    refused("DSX-E105", listed | {"first_k_dense_replace": 1})
    refused("DSX-E106", edit(AXK1, "first_k_dense_replace"))
    refused("DSX-E109", edit(AXK1, topk_method="greedy"))
    v3 = parse_model_config(V3, "v3")
    assert (v3.post_mlp_norm, v3.router_bias) == (False, True)


@pytest.mark.parametrize(
    ("base", "change", "code"),
    [
        (GLM, {"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 45}, "DSX-E105"),
        (GLM, {"mlp_layer_types": ["dense"] * 3}, "DSX-E105"),
        (GLM, {"mlp_layer_types": "dense"}, "DSX-E105"),
        (GLM, {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45}, "DSX-E105"),
        (GLM, {"first_k_dense_replace": 2}, "DSX-E105"),
        (GLM, {"partial_rotary_factor": 0.5}, "DSX-E105"),
        (V3, {"mlp_layer_types": ["sparse"] * 61}, "DSX-E104"),
        (YOUTU, {"n_routed_experts": 8}, "DSX-E104"),
        (YOUTU, {"scale_emb": 12}, "DSX-E104"),
        (MINICPM, {"num_nextn_predict_layers": 1}, "DSX-E104"),
        (MINICPM, {"scale_emb": 0}, "DSX-E105"),
        (MINICPM, {"num_attention_heads": 48, "num_key_value_heads": 48}, "DSX-E105"),
    ],
)
def test_families_refuse_what_they_do_not_have(base, change, code):
    refused(code, edit(base, **change))


def test_missing_scale_is_not_guessed():
    refused("DSX-E106", edit(MINICPM, "scale_depth"))


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("yarn", [False, True])
def test_matches_transformers(tmp_path: Path, family: str, yarn: bool):
    """同一份配置：字段、软化系数、rope 系数都与 transformers 一致。"""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cls = transformers.DeepseekV2Config if family == "v2" else transformers.DeepseekV3Config
    extra = {"num_experts_per_tok": 4} if family == "v2" else {"rope_interleave": False}
    scaling = yarn_scaling(0.8) | {"mscale": 1.1} if yarn else None
    hf = cls(rope_scaling=scaling, dtype="float16", max_position_embeddings=163840, **extra)
    hf.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.rope_layout == ("interleaved" if family == "v2" else "half")
    assert config.num_mtp_layers == (0 if family == "v2" else 1)
    assert (config.vocab_size, config.dtype, config.qk_head_dim) == (hf.vocab_size, "float16", hf.qk_head_dim)
    assert config.rope.rope_theta == hf.rope_parameters["rope_theta"]
    if yarn:
        assert config.rope.cos_sin_scale == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](hf)[1])
