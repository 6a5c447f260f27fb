"""checkpoint/config.py：白名单、两种写法、逐码报错。"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from deepseek_export.checkpoint import load_model_config, parse_model_config
from deepseek_export.checkpoint.inert import INERT_KEYS
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG
from deepseek_export.errors import DsxError

pytestmark = pytest.mark.unit

# V3、V2 是官方 config.json 的内容，V3 去掉了 FP8 的 quantization_config；其余家族只留推理用得到的字段。Sarvam-105B、A.X-K1 的原文没有
# 核对过：取值来自 transformers 的配置类，Sarvam 的字段名来自厂商随检查点发布的配置类。
_PUBLISHED = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())
V3, V2_LITE, V2 = (_PUBLISHED[name] for name in ("V3", "V2_LITE", "V2"))
KIMI, GLM, YOUTU, MINICPM = (_PUBLISHED[name] for name in ("KIMI_K2", "GLM_4_7_FLASH", "YOUTU", "MINICPM3"))
SARVAM, AXK1 = _PUBLISHED["SARVAM_105B"], _PUBLISHED["AX_K1"]


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


def edit(base: dict[str, Any], *drop: str, **changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(dict(base)) | changes
    return {key: value for key, value in data.items() if key not in drop}


def refused(code: str, data: dict[str, Any]) -> DsxError:
    with pytest.raises(DsxError) as err:
        parse_model_config(data, "测试")
    assert err.value.code == code, err.value
    return err.value


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
    usual |= {"attention_bias": False, "use_qk_norm": False, "rope_scaling": _yarn(1.0)}
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
        ("DSX-E107", {"rope_scaling": _yarn(1.0) | {"type": "telechat3-yarn"}}),
        ("DSX-E107", {"rope_scaling": _yarn(1.0) | {"type": "deepseek_yarn", "rope_type": "default"}}),
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
    refused("DSX-E107", edit(V3, rope_scaling=_yarn(1.0) | {"type": "deepseek_yarn"}))


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


def _longrope(**changes: Any) -> dict[str, Any]:
    factors = [1.0 + i / 10 for i in range(16)]
    scaling = {"type": "longrope", "short_factor": factors, "long_factor": [f + 1 for f in factors]}
    return edit(MINICPM, rope_scaling=scaling | {"original_max_position_embeddings": 32768} | changes)


def test_longrope_that_never_switches():
    """长度到不了原始长度，或长短两套因子相同：结果与长度无关，收下。"""
    rope = parse_model_config(_longrope(), "x").rope
    assert (rope.rope_type, rope.short_factor[1], rope.cos_sin_scale) == ("longrope", 1.1, 1.0)
    same = _longrope()["rope_scaling"]["short_factor"]
    rope = parse_model_config(_longrope(long_factor=same, original_max_position_embeddings=8192), "x").rope
    assert rope.cos_sin_scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(8192)))
    assert parse_model_config(_longrope(attention_factor=1.5), "x").rope.cos_sin_scale == 1.5


#: 训练框架与 transformers 真写过的，取着不起作用的值。
_INERT = {
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": ["full_attention"] * 27,
    "min_length": 0,
    "is_decoder": False,
    "unsloth_fixed": True,
    "unsloth_version": "2026.1.3",
    "router_aux_loss_coef": 0.001,
}


@pytest.mark.parametrize("base", [V3, V2_LITE, GLM, YOUTU, MINICPM, SARVAM, AXK1])
def test_fields_that_change_nothing_are_let_through(base):
    """关着的开关、生成的缺省值、记账：收下，结果与没有写一样。"""
    assert parse_model_config(edit(base, **_INERT), "x") == parse_model_config(base, "x")


def test_generation_defaults_are_those_of_transformers():
    """transformers 会写进 config.json 的每个生成参数，取它的缺省值都收下。"""
    defaults = GenerationConfig._get_default_generation_params()
    written = {key: defaults[key] for key in defaults if key in INERT_KEYS}
    assert len(written) == 19
    assert parse_model_config(edit(V3, **written), "x") == parse_model_config(V3, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("use_sliding_window", 0),
        ("max_window_layers", "28"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("min_length", 1),
        ("min_length", False),
        ("temperature", 0.6),
        ("do_sample", True),
        ("is_decoder", True),
        ("use_qk_norm", True),
        ("router_jitter_noise", "0.1"),
        ("unsloth_fixed", "yes"),
    ],
)
def test_the_same_fields_at_any_other_value_are_refused_with_the_reason(key, value):
    error = refused("DSX-E105", edit(V3, **{key: value}))
    assert f"{key} 是" in error.what
    assert error.todo.startswith(f"{key} 应为")
    assert INERT_KEYS[key].why in error.todo


def test_an_unknown_field_of_a_known_kind_is_still_refused():
    """表里逐个列着：前缀像的不算。"""
    assert "unsloth_kernel" in refused("DSX-E104", edit(V3, unsloth_kernel=True)).what


@pytest.mark.parametrize(
    "change",
    [
        {"original_max_position_embeddings": 8192},
        {"short_factor": [1.0] * 15},
        {"short_factor": 1.0},
        {"long_factor": [0.0] * 16},
        {"factor": -1.0},
        {"mscale": 1.0},
    ],
)
def test_longrope_refused(change):
    refused("DSX-E107", _longrope(**change))


@pytest.mark.parametrize("base", [V3, GLM, YOUTU, MINICPM])
def test_an_unknown_field_that_is_null_is_not_there(base):
    """EXPORT-26：null 就是没有写；别的取值照样拒绝，再长、再深也只说一行。"""
    assert parse_model_config(edit(base, sliding_window=None), "测试") == parse_model_config(base, "测试")
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    for value in (0, False, "", [], {}, "x" * 100_000, deep):
        error = refused("DSX-E104", edit(base, sliding_window=value))
        assert "sliding_window" in error.what
        assert len(error.what) < 300


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


def test_both_rope_spellings_agree():
    new = edit(V3, "rope_scaling", "rope_theta")
    new["rope_parameters"] = {"rope_theta": 10000, "rope_type": "yarn"} | _yarn(1.0)
    assert parse_model_config(new, "新") == parse_model_config(V3, "旧")
    plain = parse_model_config(edit(V3, rope_scaling=None), "x")
    assert (plain.rope.rope_type, plain.softmax_scale) == ("default", 192**-0.5)


def test_yarn_optional_values():
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "attention_factor": 1.25}
    rope = parse_model_config(edit(V3, rope_scaling=scaling), "x").rope
    assert (rope.beta_fast, rope.beta_slow, rope.truncate, rope.mscale) == (32.0, 1.0, True, None)
    assert (rope.original_max_position_embeddings, rope.cos_sin_scale) == (163840, 1.25)
    del scaling["attention_factor"]
    rope = parse_model_config(edit(V3, rope_scaling=scaling), "x").rope
    assert rope.cos_sin_scale == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("yarn", [False, True])
def test_matches_transformers(tmp_path: Path, family: str, yarn: bool):
    """同一份配置：字段、软化系数、rope 系数都与 transformers 一致。"""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cls = transformers.DeepseekV2Config if family == "v2" else transformers.DeepseekV3Config
    extra = {"num_experts_per_tok": 4} if family == "v2" else {"rope_interleave": False}
    scaling = _yarn(0.8) | {"mscale": 1.1} if yarn else None
    hf = cls(rope_scaling=scaling, dtype="float16", max_position_embeddings=163840, **extra)
    hf.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.rope_layout == ("interleaved" if family == "v2" else "half")
    assert config.num_mtp_layers == (0 if family == "v2" else 1)
    assert (config.vocab_size, config.dtype, config.qk_head_dim) == (hf.vocab_size, "float16", hf.qk_head_dim)
    assert config.rope.rope_theta == hf.rope_parameters["rope_theta"]
    if yarn:
        assert config.rope.cos_sin_scale == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](hf)[1])


def test_aliases_and_token_lists():
    data = edit(V3, "n_routed_experts", "num_nextn_predict_layers", num_local_experts=256, num_mtp_layers=0)
    config = parse_model_config(data | {"eos_token_id": [1, 2], "pad_token_id": 2}, "x")
    assert (config.n_routed_experts, config.num_mtp_layers, config.eos_token_ids) == (256, 0, (1, 2))
    refused("DSX-E105", edit(V3, num_mtp_layers=2))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":2}', "[" * 100_000, "1" * 5000, "\ud800"])
def test_unreadable(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DsxError) as err:
        load_model_config(tmp_path / "config.json")
    assert err.value.code == "DSX-E102"


def test_missing_file(tmp_path: Path):
    with pytest.raises(DsxError) as err:
        load_model_config(tmp_path)
    assert err.value.code == "DSX-E102"


def test_model_type():
    assert "deepseek_v2、deepseek_v3" in refused("DSX-E103", edit(V3, model_type="deepseek_v4")).todo
    refused("DSX-E103", edit(V3, "model_type"))
    refused("DSX-E103", edit(V3, model_type=["deepseek_v3"]))


def test_unknown_key_is_named_with_its_value():
    error = refused("DSX-E104", edit(V3, index_topk=2048))
    assert "index_topk" in error.what
    assert "2048" in error.what
    refused("DSX-E104", edit(V2, rope_interleave=True))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"moe_layer_freq": 2},
        {"num_key_value_heads": 8},
        {"mlp_bias": True},
        {"head_dim": 128},
        {"qk_head_dim": 1},
        {"pretraining_tp": True},
        {"hidden_size": 0},
        {"hidden_size": True},
        {"hidden_size": 7168.0},
        {"hidden_size": 10**30},
        {"num_hidden_layers": 10**6},
        {"n_routed_experts": 0},
        {"n_routed_experts": None},
        {"qk_rope_head_dim": 63},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": 10**400},
        {"rope_theta": 1.0},
        {"attention_bias": 0},
        {"torch_dtype": "float64"},
        {"dtype": "float32"},
        {"eos_token_id": [True]},
        {"bos_token_id": -1},
        {"rope_interleave": None},
    ],
)
def test_bad_value(change):
    error = refused("DSX-E105", edit(V3, **change))
    assert next(iter(change)) in error.what


@pytest.mark.parametrize(
    "key", ["hidden_size", "q_lora_rank", "tie_word_embeddings", "torch_dtype", "rope_theta"]
)
def test_missing_key(key):
    assert key in refused("DSX-E106", edit(V3, key)).what


@pytest.mark.parametrize(
    "scaling",
    [
        "yarn",
        {"type": "linear", "factor": 2.0},
        {"type": "yarn", "rope_type": "default"},
        _yarn(1.0) | {"llama_4_scaling_beta": 1},
        _yarn(1.0) | {"factor": 0.5},
        _yarn(1.0) | {"factor": None},
        _yarn(1.0) | {"mscale": "1"},
        _yarn(1.0) | {"truncate": None},
        _yarn(1.0) | {"beta_fast": 0.5},
        _yarn(1.0) | {"attention_factor": 0},
        _yarn(1.0) | {"partial_rotary_factor": 0.5},
        _yarn(1.0) | {"rope_theta": 5.0},
        {"rope_type": "default", "factor": 2.0},
    ],
)
def test_rope(scaling):
    refused("DSX-E107", edit(V3, rope_scaling=scaling))


def test_conflicting_rope_spellings():
    refused("DSX-E107", edit(V3, rope_parameters=_yarn(0.5)))


def test_published_fp8_blocks_are_read():
    assert parse_model_config(V3, "x").weight_block_size == (128, 128)
    published = V3["quantization_config"] | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}
    config = parse_model_config(edit(V3, quantization_config=published), "x")
    assert config.weight_block_size == (128, 128)
    assert parse_model_config(edit(V3, quantization_config=None), "x").weight_block_size is None


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": ["fp8"]},
        {"quant_method": None},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"scale_fmt": "e4m3"},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": [128, True]},
        {"weight_block_size": [128, 1 << 30]},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
        {"group_size": 128},
    ],
)
def test_any_other_quantization_is_refused_by_name(change):
    error = refused("DSX-E108", edit(V3, quantization_config=V3["quantization_config"] | change))
    assert next(iter(change)) in str(error)


@pytest.mark.parametrize("value", ["awq", ["fp8"], 1, {}])
def test_quantization_that_is_not_a_table_of_fp8(value):
    refused("DSX-E108", edit(V3, quantization_config=value))


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (V3, {"topk_method": "greedy"}),
        (V3, {"scoring_func": "softmax"}),
        (V3, {"n_group": 7}),
        (V3, {"n_group": None}),
        (V3, {"n_group": 256, "topk_group": 8}),
        (V3, {"topk_group": 9}),
        (V3, {"num_experts_per_tok": 129}),
        (V3, {"norm_topk_prob": None}),
        (V3, {"routed_scaling_factor": float("nan")}),
        (V2, {"norm_topk_prob": True}),
        (V2, {"topk_method": "gready"}),
        (V2_LITE, {"scoring_func": "sigmoid"}),
        (V2_LITE, {"num_experts_per_tok": 65}),
        (V2_LITE, {"num_experts_per_tok": None}),
    ],
)
def test_routing(base, change):
    refused("DSX-E109", edit(base, **change))


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers())
)


@given(
    key=st.sampled_from(sorted(V3)), value=_VALUES | st.dictionaries(st.text(max_size=4), _VALUES, max_size=2)
)
def test_any_single_value_is_accepted_or_refused_by_code(key, value):
    with contextlib.suppress(DsxError):
        parse_model_config(edit(V3, **{key: value}), "x")


def test_demo_config_parses():
    config = parse_model_config(json.loads(json.dumps({**DEMO_CONFIG, "torch_dtype": "bfloat16"})), "demo")
    assert (config.num_moe_layers, config.num_mtp_layers) == (3, 0)
