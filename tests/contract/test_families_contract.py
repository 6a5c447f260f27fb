"""specs/export 对各模型家族的承诺：白名单里的每一个都与 transformers 相等。"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import deepseek_export
from deepseek_export.checkpoint import Checkpoint, expected_tensors
from deepseek_export.checkpoint.families import FAMILIES
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.parity.oracle import TransformersOracle
from tests.models import ODD, TOLERANCE, VARIANTS, YARN, build_model, distance

pytestmark = pytest.mark.contract

_SCALING = {key: value for key, value in YARN.items() if key not in ("rope_theta", "rope_type")}
_COMMON = {
    **{key: value for key, value in ODD.items() if key not in ("eos_token_id", "bos_token_id")},
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
#: 厂商发布时的写法：Sarvam 自己的字段名，没有 q_lora 与分组；A.X-K1 叠放的专家，没有路由的偏置。
_PUBLISHED: dict[str, dict[str, Any]] = {
    "sarvam_mla": {
        key: value
        for key, value in _COMMON.items()
        if key not in ("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "q_lora_rank")
    }
    | {
        "num_experts": 12,
        "num_shared_experts": 2,
        "head_dim": 56,
        "q_head_dim": 40,
        "use_qk_norm": True,
        "moe_router_enable_expert_bias": True,
        "rope_scaling": _SCALING | {"type": "deepseek_yarn"},
    },
    "axk1": _COMMON | {"rope_scaling": _SCALING | {"type": "yarn"}},
}


def test_every_family_is_compared_with_transformers():
    """EXPORT-30：白名单里的每个家族都有变体，参考模型逐个与 transformers 比（tests/unit/test_reference.py）。"""
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


def test_a_renamed_family_has_its_oracle(saved):
    """EXPORT-30：kimi_k2 在 transformers 里没有自己的实现，基准就是 deepseek_v3 的那一个，读同一个目录。"""
    model, checkpoint = saved("kimi")
    ids = list(range(3, 40))
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    assert distance(TransformersOracle(checkpoint, "float32").logits(ids), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("variant", "profile"),
    [pytest.param("kimi", "mla+moe", marks=pytest.mark.slow), ("minicpm3", "mla")],
)
def test_bundles_of_other_families_pass(exported, variant: str, profile: str):
    """EXPORT-30：model_type 另起名字的（kimi_k2）与多出缩放的（minicpm3），整个 bundle 与 transformers 自己的模型相等。"""
    bundle = exported(variant, profile)
    assert bundle.manifest.model.family == VARIANTS[variant][0]
    report = deepseek_export.verify(bundle.path, levels=["block", "model", "tokens"], steps=8)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")
    assert {case.level for case in report.cases} == {"block", "model", "tokens"}


#: 每次都跑的；其余的方案只在 ``make test-all``。
_QUICK = (("sarvam_mla", "mla"), ("axk1", "full"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Callable[[str], Path]:
    """家族 → 厂商发布的写法的小检查点（随机权重，float32，带一个 MTP 层），各造一次。"""

    @functools.cache
    def build(family: str) -> Path:
        config = _PUBLISHED[family] | {"model_type": family}
        out = write_checkpoint(tmp_path_factory.mktemp(family) / "x", config, dtype="float32", mtp=True)
        if family == "axk1":
            _stack_experts(out / "model.safetensors")
        return out

    return build


def _stack_experts(file: Path) -> None:
    """逐个专家改成叠放；dense 层也写上不用的 post_mlp_layernorm。"""
    arrays = load_file(file)
    for layer in (1, 2, 3):
        head = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([arrays.pop(f"{head}{e}.{name}_proj.weight") for e in range(12)])
            for name in ("gate", "up", "down")
        )
        arrays |= {head + "gate_up_proj": np.concatenate([gate, up], 1), head + "down_proj": down}
    arrays["model.layers.0.post_mlp_layernorm.weight"] = np.full(ODD["hidden_size"], 7.0, np.float32)
    save_file(arrays, file)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("family", "profile"),
    [
        pytest.param(family, profile, marks=[pytest.mark.slow] if (family, profile) not in _QUICK else [])
        for family in _PUBLISHED
        for profile in ("baseline", "mla", "moe", "full")
    ],
)
def test_published_spellings_pass(published, tmp_path: Path, family: str, profile: str):
    """EXPORT-30：sarvam_mla、axk1 按厂商发布的写法导出，与 transformers 读同一个目录的结果相等。"""
    bundle = deepseek_export.export(published(family), tmp_path / "out", profile)
    report = deepseek_export.verify(bundle.path, levels=["block", "model", "tokens"], steps=8)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")
    assert {case.level for case in report.cases} == {"block", "model", "tokens"}


def test_sarvam_takes_apply():
    """EXPORT-30：sarvam_mla 在 transformers 里就是 DeepseekV3ForCausalLM，``apply`` 照样能用。"""
    model, ids = build_model("sarvam"), torch.arange(3, 40)[None]
    with torch.no_grad():
        want = model(ids).logits
        got = deepseek_export.apply(model, "mla+moe")(ids).logits
    assert distance(got, want) < TOLERANCE[torch.float32]


@pytest.mark.heavy
def test_stacked_experts_by_reference(published, tmp_path: Path):
    """EXPORT-30：叠放的专家按引用导出，直接指进检查点的文件，token 与 transformers 相同。"""
    bundle = deepseek_export.export(published("axk1"), tmp_path / "out", "mla+moe", weights="reference")
    report = deepseek_export.verify(bundle.path, levels=["tokens"], steps=8)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")


def test_stacked_experts_equal_those_one_by_one(published):
    """EXPORT-30：叠放与逐个存只是写法不同，打开以后张量的名字与值一样；dense 层用不着的 norm 不读。"""
    opened = Checkpoint.open(published("axk1"))
    assert set(expected_tensors(opened.config)) <= set(opened.store.names)
    name = "model.layers.2.mlp.experts.11.up_proj.weight"
    with_all = load_file(opened.path / "model.safetensors")["model.layers.2.mlp.experts.gate_up_proj"]
    assert np.array_equal(opened.store.read(name), with_all[11, ODD["moe_intermediate_size"] :])
    assert opened.ignored == ("model.layers.0.post_mlp_layernorm.weight",)
