"""specs/parity 的 dsx compare：逐块比，二分到节点，指得出是哪一个。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

import deepseek_export
from deepseek_export.backend.ort.cut import run_file
from deepseek_export.bundle import Bundle
from deepseek_export.engine.flavour import device_sm
from deepseek_export.errors import DsxError
from deepseek_export.parity.bisect import bisect_block
from deepseek_export.parity.blocks import main_blocks
from deepseek_export.parity.inputs import block_rows
from deepseek_export.parity.keys import block_keys
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.reference import Forms, load_reference
from tests.bundles import edit_model, edit_weight, find_node, run_polygraphy, set_float, tampered

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


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
