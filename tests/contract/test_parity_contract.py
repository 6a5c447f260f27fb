"""specs/parity 的承诺：对的通过，错的一定不通过，并且指得出在哪。"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import sha256_file
from deepseek_export.errors import DsxError
from deepseek_export.parity import LEVELS
from tests.models import VARIANTS, build_model, save_checkpoint

pytestmark = pytest.mark.contract


def tampered(bundle: Bundle, tmp_path: Path, change) -> Bundle:
    """拷贝一份 bundle，改模型或权重，再把 manifest 的哈希补对（模拟编译器的缺陷，而不是文件损坏）。"""
    target = tmp_path / "bad"
    shutil.copytree(bundle.path, target)
    change(target)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    for name in manifest["files"]:
        path = target / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (target / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    return Bundle.open(target)


def edit_model(change):
    def apply(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        onnx.save(model, folder / "model.onnx")

    return apply


def edit_weight(bundle: Bundle, name: str, change):
    def apply(folder: Path) -> None:
        model = onnx.load(bundle.model_path, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        where = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / where["location"]).open("r+b") as file:
            file.seek(int(where["offset"]))
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = np.frombuffer(file.read(int(where["length"])), dtype).reshape(tuple(tensor.dims)).copy()
            file.seek(int(where["offset"]))
            file.write(np.ascontiguousarray(change(array)).tobytes())

    return apply


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


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16"])
def test_narrow_cache_is_measured(exported, cache_dtype: str):
    """PARITY-2：窄缓存能导出、能运行；op 与 block 层按同样的窄缓存比，仍在 float32 容差之内。"""
    bundle = exported("v3-yarn", "mla", overrides=(f"mla.cache_dtype={cache_dtype}",))
    assert bundle.manifest.cache.bytes_per_token == 56 * 3 * 2
    report = deepseek_export.verify(bundle.path, levels=["op"])
    assert report.passed, report.first_failure
    model = deepseek_export.load(bundle.path)
    assert len(model.generate([[1, 2, 3], [4]], 5).token_ids[0]) == 5


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

        def change(model):
            node = next(
                n for n in model.graph.node if n.op_type == "MlaAttention" and n.name.startswith("layers.1")
            )
            next(a for a in node.attribute if a.name == "scale").f = 40**-0.5

        self.check(tampered(v3_bundle, tmp_path, edit_model(change)), "block", "layers.1.self_attn")

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

        def change(model):
            node = next(n for n in model.graph.node if "layers.0.self_attn.kv_a_layernorm" in n.name)
            next(a for a in node.attribute if a.name == "epsilon").f = 1e-2

        self.check(tampered(v3_bundle, tmp_path, edit_model(change)), "block", "layers.0.self_attn")

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
    assert run_polygraphy(report.polygraphy) == 0
    edit_weight(v3_bundle, "lm_head.weight", lambda w: w * 1.01)(folder)
    assert run_polygraphy(report.polygraphy) == 1


def run_polygraphy(command: str) -> int:
    program, *arguments = shlex.split(command)
    assert program == "polygraphy"
    script = "import sys; from polygraphy.tools import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, check=False
    ).returncode


def test_checkpoint_must_be_the_one_exported(saved, v3_bundle: Bundle, tmp_path: Path):
    """PARITY-5：对照的检查点必须就是导出时的那一个。"""
    other = save_checkpoint(build_model("v3-yarn", vocab_size=97), tmp_path / "other")
    for against, code in ((other, "DSX-E602"), (tmp_path / "nowhere", "DSX-E601")):
        with pytest.raises(DsxError) as error:
            deepseek_export.verify(v3_bundle.path, against)
        assert error.value.code == code
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
