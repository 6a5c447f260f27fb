"""checkpoint/config.py：白名单、两种写法、逐码报错。"""

from __future__ import annotations

import contextlib
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
from tests.configs import AXK1, GLM, MINICPM, SARVAM, V2, V2_LITE, V3, YOUTU, edit, refused, yarn_scaling

pytestmark = pytest.mark.unit


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


def test_both_rope_spellings_agree():
    new = edit(V3, "rope_scaling", "rope_theta")
    new["rope_parameters"] = {"rope_theta": 10000, "rope_type": "yarn"} | yarn_scaling(1.0)
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
        yarn_scaling(1.0) | {"llama_4_scaling_beta": 1},
        yarn_scaling(1.0) | {"factor": 0.5},
        yarn_scaling(1.0) | {"factor": None},
        yarn_scaling(1.0) | {"mscale": "1"},
        yarn_scaling(1.0) | {"truncate": None},
        yarn_scaling(1.0) | {"beta_fast": 0.5},
        yarn_scaling(1.0) | {"attention_factor": 0},
        yarn_scaling(1.0) | {"partial_rotary_factor": 0.5},
        yarn_scaling(1.0) | {"rope_theta": 5.0},
        {"rope_type": "default", "factor": 2.0},
    ],
)
def test_rope(scaling):
    refused("DSX-E107", edit(V3, rope_scaling=scaling))


def test_conflicting_rope_spellings():
    refused("DSX-E107", edit(V3, rope_parameters=yarn_scaling(0.5)))


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
