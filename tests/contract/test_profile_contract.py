"""specs/profile、specs/mla、specs/moe、specs/export 里由整条链路证明的承诺。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deepseek_export
from deepseek_export.checkpoint import parse_model_config
from deepseek_export.errors import DsxError
from deepseek_export.profile import BUILTIN_PROFILES, resolve_profile
from deepseek_export.progress import Progress
from tests.models import build_model, save_checkpoint

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("profile", "overrides", "code", "named"),
    [
        ("mlaa", [], "DSX-E001", "mla"),
        ("mla", ["mla.from=absorb"], "DSX-E002", "form"),
        ("mla", ["mla.form=fast"], "DSX-E003", "absorb"),
        ("moe", ["mla.form=naive"], "DSX-E004", "mla"),
        ("nowhere/x.toml", [], "DSX-E005", "x.toml"),
    ],
)
def test_unclear_profiles_are_refused_by_name(profile: str, overrides: list[str], code: str, named: str):
    """PROFILE-2：拒绝并指明键、值、允许的取值。"""
    with pytest.raises(DsxError) as error:
        resolve_profile(profile, overrides)
    assert error.value.code == code
    assert named in str(error.value)


def test_profiles_compose_and_round_trip(exported, tmp_path: Path):
    """PROFILE-3：可以组合、可以存成 TOML；manifest 里是解析后的完整方案。"""
    composed = resolve_profile("mla+moe", ["mla.form=absorb"])
    (tmp_path / "mine.toml").write_text(composed.to_toml(), encoding="utf-8")
    assert resolve_profile(tmp_path / "mine.toml") == composed
    bundle = exported("v3-yarn", "mla+moe")
    manifest = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["profile"] == resolve_profile("mla+moe").model_dump()
    assert BUILTIN_PROFILES["baseline"] == deepseek_export.OptimizationProfile()


def test_latent_cache_saves_at_least_40_percent_at_8192_tokens(exported):
    """MLA-4：按导出的图的实际 I/O 计算，8192 token 的缓存比 baseline 少 40% 以上；每个家族公开的真实形状亦然。"""
    tokens = 8192
    latent = exported("v3-yarn", "mla").manifest.cache.bytes_per_token * tokens
    expanded = exported("v3-yarn", "baseline").manifest.cache.bytes_per_token * tokens
    assert latent <= 0.6 * expanded
    published = json.loads((ROOT / "tools/published_configs.json").read_text(encoding="utf-8"))
    savings = {}
    for name, data in published.items():
        config = parse_model_config(data, name)
        assert config.latent_cache_values == {"minicpm3": 288}.get(config.family, 576)
        savings[name] = 1 - config.latent_cache_values / config.expanded_cache_values
    assert min(savings.values()) >= 0.4


def test_refused_lowering_is_recorded_and_printed(exported, saved, tmp_path: Path):
    """MOE-4：换不成 ONNX Runtime kernel 的专家留在函数体里，原因写进 manifest，并报告一行。"""
    lines: list[str] = []

    class Notes(Progress):
        def note(self, line: str) -> None:
            lines.append(line)

    checkpoint = saved("v3-yarn")[1].path
    options = {"target": "ort-cpu", "dtype": "float16", "progress": Notes()}
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", "moe", **options)
    assert lines == bundle.manifest.fallbacks
    assert "float16" in lines[0]
    passes = [result for graph in bundle.manifest.graphs for result in graph.passes]
    refused = [refusal for result in passes for refusal in result.refused]
    assert {refusal.node.split("/")[0] for refusal in refused} == {"layers.1.mlp", "layers.2.mlp"}
    assert all(refusal.reason and refusal.value for refusal in refused)
    assert bundle.manifest.graphs[0].op_counts["dsx::MoeExperts"] == 2
    assert bundle.manifest.float32_islands  # float16 的 bundle 列出以 float32 计算的节点
    lowered = exported("v3-yarn", "moe", "ort-cpu").manifest
    assert lowered.fallbacks == []
    assert lowered.graphs[0].op_counts["com.microsoft::MoE"] == 2


@pytest.fixture(scope="module")
def drifting_checkpoint(tmp_path_factory) -> Path:
    """一个 float16 下 absorb 会溢出、naive 不会的检查点：W_UK 与 query 很大而 latent 很小，乘积 q·W_UK 超过 65504。

    注意力的分数只放大到 8 倍，W_UK 只放大到 100 倍：softmax 还没有饱和，逐算子的随机输入上两个接近的分数也不会因舍入换了先后。
    """
    model, weights, latent = build_model("v3"), 100, 30
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.kv_b_proj.weight.mul_(weights)
            attention.kv_a_layernorm.weight.div_(weights * latent)
            attention.kv_a_proj_with_mqa.weight[attention.kv_b_proj.in_features :].div_(latent)
            attention.q_b_proj.weight.mul_(8 * latent)
            attention.o_proj.weight.mul_(latent)
    return save_checkpoint(model, tmp_path_factory.mktemp("drift"))


def test_drift_is_refused_by_default(drifting_checkpoint: Path, tmp_path: Path):
    """EXPORT-9：--check 不过时没有 bundle，错误指出哪一层级哪一处。"""
    with pytest.raises(DsxError) as error:
        deepseek_export.export(
            drifting_checkpoint,
            tmp_path / "out",
            "mla",
            dtype="float16",
            overrides=["mla.form=absorb"],
            check=True,
        )
    assert error.value.code == "DSX-E605"
    assert list(tmp_path.iterdir()) == []


def test_on_drift_without_check_is_refused(drifting_checkpoint: Path, tmp_path: Path):
    """PROFILE-2：不校验就谈不上退回；设了而不起作用的键也要拒绝。"""
    with pytest.raises(DsxError) as error:
        deepseek_export.export(
            drifting_checkpoint, tmp_path / "out", "mla", overrides=["fallback.on_drift=naive"]
        )
    assert error.value.code == "DSX-E004"


def test_drift_can_fall_back_to_naive_and_says_so(drifting_checkpoint: Path, tmp_path: Path):
    """EXPORT-9：on_drift=naive 时改用 naive 重导、再校验，manifest 与方案如实记录。"""
    bundle = deepseek_export.export(
        drifting_checkpoint,
        tmp_path / "out",
        "mla",
        dtype="float16",
        overrides=["mla.form=absorb", "fallback.on_drift=naive"],
        check=True,
    )
    assert bundle.manifest.profile.mla.form == "naive"
    assert "on_drift=naive" in bundle.manifest.fallbacks[0]
