"""specs/parity 的承诺：对的通过，错的一定不通过，并且指得出在哪。"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

import deepseek_export
from deepseek_export.backend.ort.cut import run_file
from deepseek_export.bundle import Bundle
from deepseek_export.cli.verify import command as verify_command
from deepseek_export.engine.flavour import device_sm
from deepseek_export.errors import DsxError
from deepseek_export.parity.bisect import bisect_block
from deepseek_export.parity.blocks import main_blocks
from deepseek_export.parity.checks import LEVELS
from deepseek_export.parity.inputs import block_rows
from deepseek_export.parity.keys import block_keys
from deepseek_export.parity.report import ParityReport
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.reference import Forms, load_reference
from tests.bundles import edit_model, edit_weight, find_node, run_polygraphy, set_float, tampered
from tests.models import VARIANTS, build_model, save_checkpoint

pytestmark = pytest.mark.contract


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


class TestCompare:
    """PARITY-8 到 PARITY-11：``dsx compare``。"""

    @pytest.fixture(scope="class")
    def good(self, v3_bundle: Bundle, tmp_path_factory):
        """好 bundle 的比较，存在自己的目录里。"""
        folder = tmp_path_factory.mktemp("compare") / "out"
        return deepseek_export.compare(v3_bundle.path, folder=folder)

    def test_every_block_agrees_and_the_command_repeats_it(self, good, v3_bundle: Bundle):
        """PARITY-8：每个块、prefill 与解码都一致；存下的是 Polygraphy 的格式，打印的命令原样执行返回 0。"""
        assert good.passed, good.first_failure
        names = ["embed", *(f"layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")), "head"]
        assert list(dict.fromkeys(row.block for row in good.cases)) == names
        assert {row.phase for row in good.cases} == {"prefill", "decode"}
        folder = Path(good.folder)
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            inputs = load_json(str(folder / "model/inputs.json"))
            (runner,) = RunResults.load(str(folder / "model/outputs.json"))
        assert runner[0] == "pytorch"
        assert len(inputs) == len(runner[1]) == 2
        assert inputs[1]["pytorch/layers.1/x"].shape == (2, 1, v3_bundle.manifest.model.hidden_size)
        process = run_polygraphy(good.commands["model.onnx"])
        assert process.returncode == 0, process.stdout
        assert "layers.2/x" in process.stdout

    def test_float16_too(self, exported, tmp_path: Path):
        """PARITY-8：float16 同样；路由近平局的行换成不平局的，所以 Polygraphy 不会把它当错。"""
        bundle = exported("v3-yarn", "mla+moe", dtype="float16", overrides=("mla.form=naive",))
        report = deepseek_export.compare(bundle.path, folder=tmp_path / "out")
        assert report.passed, report.first_failure
        assert sum(row.case.near_ties for row in report.cases) > 0
        process = run_polygraphy(report.commands["model.onnx"])
        assert process.returncode == 0, process.stdout

    def test_bfloat16_cache_is_saved_as_float32(self, exported, tmp_path: Path):
        """PARITY-8：Polygraphy 存不了 bfloat16，边上无损地转成 float32；只比一层时只写一层。"""
        bundle = exported("v3-yarn", "mla", overrides=("mla.cache_dtype=bfloat16",))
        report = deepseek_export.compare(bundle.path, blocks=["1"], folder=tmp_path / "out")
        assert report.passed, report.first_failure
        assert {row.block for row in report.cases} == {"layers.1.self_attn", "layers.1.mlp"}
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            inputs = load_json(str(tmp_path / "out/model/inputs.json"))
        assert inputs[0]["kv_cache.1"].dtype == np.float32
        assert not any("layers.2" in name for name in inputs[0])

    @pytest.mark.slow
    def test_int8_cache_is_compared_by_value(self, exported, tmp_path: Path):
        """PARITY-8：int8 缓存按还原出来的值比；Polygraphy 不会还原，命令里放过它，其余照比。"""
        bundle = exported("v3-yarn", "mla+moe", overrides=("mla.cache_dtype=int8",))
        report = deepseek_export.compare(bundle.path, blocks=["1"], folder=tmp_path / "out")
        assert report.passed, report.first_failure
        (cache,) = [row.case for row in report.cases if "kv_cache" in row.case.name and row.phase == "decode"]
        assert cache.tolerance == tolerance("narrow_cache", "int8")
        process = run_polygraphy(report.commands["model.onnx"])
        assert process.returncode == 0, process.stdout

    def test_weights_by_reference(self, v3_checkpoint: Path, tmp_path: Path):
        """PARITY-8：按引用的 bundle 也一样，存下的目录自带权重，不靠检查点。"""
        bundle = deepseek_export.export(v3_checkpoint, tmp_path / "by", "mla+moe", weights="reference")
        report = deepseek_export.compare(bundle.path, folder=tmp_path / "out")
        assert report.passed, report.first_failure
        shutil.rmtree(bundle.path)
        process = run_polygraphy(report.commands["model.onnx"])
        assert process.returncode == 0, process.stdout

    def test_only_the_bad_block_fails(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-9：第 1 层的权重错了，只有那一块不过，后面的块不受牵连；报告给出坐标与那里的两个值，命令返回 1。"""
        name = "model.layers.1.self_attn.o_proj.weight"
        bad = tampered(v3_bundle, tmp_path, edit_weight(v3_bundle, name, lambda w: w * 1.01))
        report = deepseek_export.compare(bad.path)
        assert {row.block for row in report.cases if not row.case.passed} == {"layers.1.self_attn"}
        failure = report.first_failure
        assert failure is not None
        m = failure.case.measure
        assert m is not None
        assert len(m.coordinate) == 3
        assert abs(m.got - m.want) == pytest.approx(m.max_abs)
        saved = json.loads((bad.path / "reports/compare/compare.json").read_text(encoding="utf-8"))
        assert saved["passed"] is False
        process = run_polygraphy(report.commands["model.onnx"])
        assert process.returncode == 1
        assert "FAILED" in process.stdout

    def test_a_wrong_shape_is_a_failure(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-9：连形状都不对时报告两个形状。"""

        def change(model):
            node = next(n for n in model.graph.node if "logits" in n.output)
            node.output[0] = "logits_3d"
            model.graph.node.append(
                onnx.helper.make_node("Flatten", ["logits_3d"], ["logits"], name="head/Flatten", axis=2)
            )
            shape = next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape
            del shape.dim[0]
            shape.dim[0].dim_param = "BL"

        bad = tampered(v3_bundle, tmp_path, edit_model(change))
        report = deepseek_export.compare(bad.path, blocks=["head"], folder=tmp_path / "out")
        assert report.first_failure is not None
        assert report.first_failure.case.note == "形状是 [48, 211]，应为 [2, 24, 211]"

    def test_backends_are_refused_by_name(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-10：不存在的、这里用不了的后端，以及不存在的块，都在干活之前带码拒绝；不少比，也不碰别人的目录。"""
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.tex").write_text("")
        for options, code in (
            ({"backends": ["ort", "onnxruntime"]}, "DSX-E613"),
            ({"backends": ["ort", "trt"]}, "DSX-E918" if device_sm() is None else "DSX-E913"),
            ({"blocks": ["3"]}, "DSX-E615"),
            ({"folder": mine}, "DSX-E401"),
        ):
            with pytest.raises(DsxError) as error:
                deepseek_export.compare(v3_bundle.path, **{"folder": tmp_path / "out", **options})
            assert error.value.code == code
        assert (mine / "thesis.tex").is_file()
        assert not (tmp_path / "out").exists()

    def test_a_graph_the_backend_cannot_run(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-10：后端跑不动时附它的原话，不留半个目录。"""

        def change(model):
            find_node(model, "MatMul", "head").op_type = "NoSuchOp"

        bad = tampered(v3_bundle, tmp_path, edit_model(change))
        with pytest.raises(DsxError) as error:
            deepseek_export.compare(bad.path, blocks=["head"], folder=tmp_path / "out")
        assert error.value.code == "DSX-E616"
        assert "NoSuchOp" in error.value.what
        assert not (tmp_path / "out").exists()

    def bisect(self, bundle: Bundle, tmp_path: Path, change):
        bad = tampered(bundle, tmp_path, change)
        report = deepseek_export.compare(bad.path, bisect=True, folder=tmp_path / "out")
        assert report.culprit is not None
        return report.culprit

    def test_bisect_names_the_attribute(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-11：改坏一个属性，定位到那个节点，并说出属性原来是多少；逐节点的命令原样执行返回 1。"""
        scope = "layers.0.self_attn.kv_a_layernorm"
        change = edit_model(lambda m: set_float(find_node(m, "RMSNormalization", scope), "epsilon", 1e-2))
        culprit = self.bisect(v3_bundle, tmp_path, change)
        assert (culprit.graph, culprit.block) == ("model.onnx", "layers.0.self_attn")
        assert [node.name for node in culprit.nodes] == [f"{scope}/RMSNormalization_14"]
        assert culprit.causes == [f"{scope}/RMSNormalization_14 的属性 epsilon 是 0.01，捕获时是 1e-06"]
        assert culprit.case is not None
        assert not culprit.case.passed
        process = run_polygraphy(culprit.command)
        assert process.returncode == 1
        assert "layers.0/rms_norm_2" in process.stdout

    @pytest.mark.parametrize("target", ["portable", "ort-cpu"])
    def test_bisect_names_the_weight(self, exported, target: str, tmp_path: Path):
        """PARITY-11：改坏一个权重，定位到用它的节点（下沉之后是替换它的那几个），并说出哪个元素与检查点不同。"""
        bundle = exported("v3-yarn", "mla+moe", target)
        name = "model.layers.1.mlp.experts.*.down_proj.weight"
        culprit = self.bisect(
            bundle, tmp_path, edit_weight(bundle, name, lambda w: w[[1, 0, *range(2, len(w))]])
        )
        assert (culprit.block, culprit.value) == ("layers.1.mlp", "layers.1/moe_experts")
        ops = {
            "portable": ["dsx::MoeExperts"],
            "ort-cpu": ["com.microsoft::MoEGroupRouter", "com.microsoft::MoE"],
        }
        assert [node.op for node in culprit.nodes][: len(ops[target])] == ops[target]
        (cause,) = culprit.causes
        assert cause.startswith(f"权重 {name} 与检查点不同：[")

    def test_bisect_names_the_wiring_and_the_constant(self, v3_bundle: Bundle, tmp_path: Path):
        """PARITY-11：接错输入、换了常量也说得出。"""

        def rewire(model):
            find_node(model, "Add", "layers.2/").input[0] = "embed/x"

        (cause,) = self.bisect(v3_bundle, tmp_path / "a", edit_model(rewire)).causes
        assert cause.endswith("的第 0 个输入接的是 embed/x，捕获时是 layers.1/x")

        def rescale(model):
            node = find_node(model, "Mul", "embed")
            (name,) = set(node.input) & {tensor.name for tensor in model.graph.initializer}
            tensor = next(t for t in model.graph.initializer if t.name == name)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.01, name))

        culprit = self.bisect(v3_bundle, tmp_path / "b", edit_model(rescale))
        assert culprit.block == "embed"
        (cause,) = culprit.causes
        assert "与捕获时的常量不同" in cause

    def test_bisect_after_lowering_gives_no_false_reason(self, exported, tmp_path: Path):
        """PARITY-11：下沉改写过的地方（形状成了常量，转置换成 Split 与 Concat）不是理由；出错的那一段说得出。"""

        def swap(model):
            node = find_node(model, "Concat", "layers.1.self_attn/Transpose")
            first, second = node.input
            node.input[:] = [second, first]

        culprit = self.bisect(exported("v3-yarn", "mla+moe", "ort-cpu"), tmp_path, edit_model(swap))
        assert culprit.block == "layers.1.self_attn"
        assert "Concat" in [node.op for node in culprit.nodes]
        assert culprit.causes == []

    def test_bisect_accuses_no_healthy_node(self, v3_bundle: Bundle, saved, tmp_path: Path):
        """PARITY-11：好的 bundle 里每个块、每个节点单独都对，如实说没有元凶（整块才错时就是这个结果）。"""
        manifest, checkpoint = v3_bundle.manifest, saved("v3-yarn")[1]
        model = load_reference(checkpoint, Forms.for_reference(manifest.profile))
        keys = block_keys(manifest, manifest.dtype)
        blocks = list(main_blocks(manifest, model, block_rows(manifest, 0), keys))
        for i, block in enumerate(blocks):
            folder = tmp_path / str(i)
            where = (
                v3_bundle,
                checkpoint,
                manifest.main,
                model,
                block,
                ModelGraph(v3_bundle, manifest.main.file),
            )
            culprit = bisect_block(*where, run_file, folder, folder)
            assert culprit.case is None, culprit
            assert (culprit.value, culprit.nodes, culprit.causes) == ("", [], [])
            assert culprit.checked >= 5


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
