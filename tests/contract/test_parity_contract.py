"""specs/parity 的承诺：对的通过，错的一定不通过，并且指得出在哪。"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.cli.verify import command as verify_command
from deepseek_export.errors import DsxError
from deepseek_export.parity.checks import LEVELS
from deepseek_export.parity.report import ParityReport
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.progress import Progress
from tests.bundles import edit_model, edit_weight, find_node, run_polygraphy, set_float, tampered
from tests.models import VARIANTS, build_model, save_checkpoint

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("variant", ["v3-yarn", "v2-group", "v2-lite", "v3-bias-tied"])
def test_correct_bundles_pass(exported, variant: str, target: str):
    """PARITY-1：float32 的 mla+moe 在四个层级全部通过，greedy 64 步逐 token 与 transformers 相同。"""
    report = deepseek_export.verify(exported(variant, "mla+moe", target).path)
    assert report.passed, report.first_failure
    assert report.oracle.startswith("transformers")
    assert {case.level for case in report.cases} == set(LEVELS)
    logits = [case.measure.max_abs for case in report.cases if case.level == "model"]
    assert max(logits) <= 1e-4
    assert all(case.near_ties == 0 for case in report.cases)


class _Steps(Progress):
    """记下每个阶段的总量与前进了多少。"""

    def __init__(self) -> None:
        self.stages: list[list[Any]] = []

    def start(self, stage: str, total: int | None = None, unit: Any = "items") -> None:
        self.stages.append([stage, total, 0])

    def advance(self, amount: int = 1, detail: str = "") -> None:
        self.stages[-1][2] += amount


def test_every_level_shows_how_far_it_is(exported):
    """PARITY-1：四个层级都有总量，做完时正好走满，tokens 级也是。"""
    steps = _Steps()
    deepseek_export.verify(exported("v3-yarn", "mla+moe").path, steps=2, verify_weights=False, progress=steps)
    found = {stage: (total, done) for stage, total, done in steps.stages if stage.startswith("校验 ")}
    assert {stage.partition("：")[0] for stage in found} == {f"校验 {level}" for level in LEVELS}
    assert all(total == done > 1 for total, done in found.values()), found


@pytest.mark.parametrize("profile", ["baseline", "mla", "moe"])
@pytest.mark.parametrize("variant", ["v3-yarn", "v2-lite"])
def test_every_profile_passes(exported, variant: str, profile: str):
    """PARITY-1：其余方案同样通过。"""
    report = deepseek_export.verify(exported(variant, profile).path, levels=["block", "tokens"], steps=24)
    assert report.passed, report.first_failure


@pytest.mark.parametrize("form", ["absorb", "naive"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_both_forms_and_dtypes_pass(exported, form: str, dtype: str):
    """PARITY-2：两种 MLA 形式、两种 dtype 都在容差表之内（float16 的近平局单独计数）。"""
    bundle = exported("v3-yarn", "mla+moe", dtype=dtype, overrides=(f"mla.form={form}",))
    report = deepseek_export.verify(bundle.path, steps=16)
    assert report.passed, report.first_failure


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
class TestNarrowCache:
    """PARITY-12：缓存比模型窄的 bundle。"""

    @pytest.fixture
    def bundle(self, exported, cache_dtype: str) -> Bundle:
        return exported("v3-yarn", "mla+moe", overrides=(f"mla.cache_dtype={cache_dtype}",))

    def test_verifies_at_every_level(self, bundle: Bundle, cache_dtype: str):
        """对的 bundle 四级全过、命令的退出码是 0；op 层喂同样的窄缓存，仍按 float32 的容差；舍入的代价另列一级。"""
        row = 40 + 2 * 16 + 6 if cache_dtype == "int8" else 56 * 2
        assert bundle.manifest.cache.bytes_per_token == row * 3
        result = CliRunner().invoke(verify_command, [str(bundle.path), "--steps", "16", "--json"])
        assert result.exit_code == 0, result.output
        report = ParityReport.model_validate(_without_passed(bundle.path / "reports/parity.json"))
        assert report.passed, report.first_failure
        assert report.levels == [*LEVELS, "loss"]
        worst = {
            level: max(case.measure.max_abs for case in report.cases if case.level == level and case.measure)
            for level in ("model", "loss")
        }
        assert worst["model"] < worst["loss"] / 2, "参照的缓存没有舍入到同样的 dtype"
        assert all(
            case.tolerance == tolerance("op", "float32") for case in report.cases if case.level == "op"
        )
        assert any(cache_dtype in line for line in report.notes)

    @pytest.mark.parametrize("defect", ["mscale", "lm_head"])
    def test_defects_are_caught_without_the_blocks(self, bundle: Bundle, tmp_path: Path, defect: str):
        """只比 model 与 tokens，错的仍不通过：第 1 层的 softmax scale 漏乘 mscale 平方；lm_head 大了百分之一。"""
        changes = {
            "mscale": edit_model(
                lambda m: set_float(find_node(m, "MlaAttention", "layers.1"), "scale", 40**-0.5)
            ),
            "lm_head": edit_weight(bundle, "lm_head.weight", lambda w: w * 1.01),
        }
        bad = tampered(bundle, tmp_path, changes[defect])
        report = deepseek_export.verify(bad.path, levels=["model", "tokens"], steps=8)
        failed = {case.level for case in report.cases if not case.passed}
        assert {"model", "loss"} <= failed, failed


def _without_passed(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["passed"]
    return data


class TestDefectsAreCaught:
    """PARITY-3：人为植入的缺陷一定不通过，第一处失败指向病根。"""

    def check(self, bundle: Bundle, level: str, name: str) -> None:
        report = deepseek_export.verify(bundle.path)
        assert not report.passed
        assert report.first_failure is not None
        assert (report.first_failure.level, report.first_failure.name.split(" ")[0]) == (level, name)
        saved = json.loads((bundle.path / "reports/parity.json").read_text(encoding="utf-8"))
        assert saved["passed"] is False

    def test_missing_mscale_square(self, v3_bundle: Bundle, tmp_path: Path):
        """softmax scale 漏乘 YaRN 的 mscale 平方（只在第 1 层）。"""

        change = edit_model(lambda m: set_float(find_node(m, "MlaAttention", "layers.1"), "scale", 40**-0.5))
        self.check(tampered(v3_bundle, tmp_path, change), "block", "layers.1.self_attn")

    def test_swapped_experts(self, v3_bundle: Bundle, tmp_path: Path):
        """最后一层的两个专家互换。"""
        name = "model.layers.2.mlp.experts.*.down_proj.weight"
        change = edit_weight(v3_bundle, name, lambda w: w[[1, 0, *range(2, len(w))]])
        self.check(tampered(v3_bundle, tmp_path, change), "op", "layers.2")

    def test_router_bias_lost(self, v3_bundle: Bundle, tmp_path: Path):
        """第 1 层的 e_score_correction_bias 丢了。"""
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        self.check(
            tampered(v3_bundle, tmp_path, edit_weight(v3_bundle, name, np.zeros_like)), "op", "layers.1"
        )

    def test_wrong_norm_epsilon(self, v3_bundle: Bundle, tmp_path: Path):
        """kv_a_layernorm 用了大得多的 eps。"""

        scope = "layers.0.self_attn.kv_a_layernorm"
        change = edit_model(lambda m: set_float(find_node(m, "RMSNormalization", scope), "epsilon", 1e-2))
        self.check(tampered(v3_bundle, tmp_path, change), "block", "layers.0.self_attn")

    def test_wrong_frequencies(self, v3_bundle: Bundle, tmp_path: Path):
        """RoPE 频率错了。"""

        def change(model):
            tensor = next(t for t in model.graph.initializer if list(t.dims) == [8] and t.data_type == 1)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, tensor.name))

        self.check(tampered(v3_bundle, tmp_path, edit_model(change)), "block", "rope")

    def test_hidden_norm_lost_in_the_head(self, v3_bundle: Bundle, tmp_path: Path):
        """lm_head 的权重错位一行。"""
        change = edit_weight(v3_bundle, "lm_head.weight", lambda w: np.roll(w, 1, axis=0))
        self.check(tampered(v3_bundle, tmp_path, change), "block", "head")


def test_polygraphy_repeats_the_comparison(v3_bundle: Bundle, tmp_path: Path):
    """PARITY-4：报告里的 polygraphy 命令照抄就能跑；对的返回 0，错的返回 1。"""
    folder = tmp_path / "good"
    shutil.copytree(v3_bundle.path, folder)
    report = deepseek_export.verify(folder, levels=["block"])
    assert report.polygraphy is not None
    assert run_polygraphy(report.polygraphy).returncode == 0
    edit_weight(v3_bundle, "lm_head.weight", lambda w: w * 1.01)(folder)
    assert run_polygraphy(report.polygraphy).returncode == 1


def test_checkpoint_must_be_the_one_exported(saved, v3_bundle: Bundle, tmp_path: Path):
    """PARITY-5：对照的检查点必须就是导出时的那一个。"""
    other = save_checkpoint(build_model("v3-yarn", vocab_size=97), tmp_path / "other")
    for against, code in ((other, "DSX-E602"), (tmp_path / "nowhere", "DSX-E601")):
        with pytest.raises(DsxError) as error:
            deepseek_export.verify(v3_bundle.path, against)
        assert error.value.code == code
    with pytest.raises(DsxError) as error:
        deepseek_export.verify(v3_bundle.path, levels=["oops"])
    assert error.value.code == "DSX-E607"
    with pytest.raises(DsxError) as error:
        deepseek_export.verify(v3_bundle.path, prompts=["文本"])
    assert error.value.code == "DSX-E604"
    with pytest.raises(DsxError) as error:
        deepseek_export.verify(v3_bundle.path, steps=10_000)
    assert error.value.code == "DSX-E604"


def test_without_transformers_the_reference_is_named(v3_bundle: Bundle, monkeypatch):
    """PARITY-6：没有 transformers 时以 dsx 参考模型为准，并在报告里写明；太旧的版本拒绝。"""
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = deepseek_export.verify(v3_bundle.path, levels=["model", "tokens"], steps=8)
    assert report.passed
    assert report.oracle == "dsx reference"
    assert any("transformers" in note for note in report.notes)
    old = type(sys)("transformers")
    old.__version__ = "4.57.0"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(DsxError) as error:
        deepseek_export.verify(v3_bundle.path, levels=["model"])
    assert error.value.code == "DSX-E603"


@pytest.mark.slow
def test_the_acceptance_models_of_the_project(tmp_path: Path):
    """PARITY-7：hidden 256、4 层、8 头、16 专家 top-4 分 4 组的 V3 与它的 V2 孪生，-p mla 导出，64 步相同，误差 ≤ 1e-4。"""
    settings = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
    }
    assert {"v3", "v2-group"} <= VARIANTS.keys()
    for variant in ("v3", "v2-group"):
        checkpoint = save_checkpoint(build_model(variant, **settings), tmp_path / variant)
        deepseek_export.export(checkpoint, tmp_path / f"{variant}-out", "mla")
        report = deepseek_export.verify(tmp_path / f"{variant}-out", steps=64)
        assert report.passed, report.first_failure
        assert max(c.measure.max_abs for c in report.cases if c.level == "model") <= 1e-4
