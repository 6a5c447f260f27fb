"""specs/tensorrt：建好之后的引擎，命令行怎样找到、诊断、比较它；没有 GPU 时能证明的部分。"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export.backend import backend_named
from deepseek_export.backend.ort.cut import run_file
from deepseek_export.backend.tensorrt.cut import CutEngines
from deepseek_export.backend.tensorrt.engine import find_engine
from deepseek_export.bundle import Bundle
from deepseek_export.cli import doctor
from deepseek_export.cli.bundle_plugins import diagnose_bundle
from deepseek_export.cli.main import cli
from deepseek_export.engine.flavour import choose, device_sm, load
from deepseek_export.engine.plugins import PLUGIN_OPS
from deepseek_export.passes.lower_mla_to_tensorrt import NATIVE_ATTENTION
from tests.bundles import edit_model, find_node, run_polygraphy, set_float, tampered
from tests.engines import refused
from tools.make_engine_graphs import build_for, make_bundle

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tools")


@pytest.fixture(scope="module")
def bundle(folder) -> Bundle:
    """deepseek_v3 小配置的 tensorrt-rtx float16 bundle（MLA + MoE）。"""
    return make_bundle("deepseek_v3", folder)


@pytest.fixture(scope="module")
def built(bundle):
    """为 sm89 建好的引擎。"""
    return build_for(bundle, 89)


def test_doctor_lists_plugins_creators_and_engines(folder, bundle, built):
    """TRT-8：每个插件节点、它的 creator、登记得上没有；建好的引擎；缺什么。"""
    found = diagnose_bundle(bundle.path)
    version = load(choose("rtx")).__version__
    described = {"directory": "rtx-sm89", "version": version, "plans": ["model.plan"], "problem": None}
    assert found["engines"] == [described]
    assert found["refusal"] is None
    assert found["flavours"]["rtx"]["creators"] == sorted(spec.name for spec in PLUGIN_OPS)
    config = bundle.manifest.model
    assert Counter(node["creator"] for node in found["nodes"]) == {
        "dsx::LatentAttention/1": config.num_hidden_layers,
        "dsx::MoeExperts/1": config.num_moe_layers,
    }
    assert all(node["registered"]["rtx"] and node["function_body"] for node in found["nodes"])
    assert found["missing"] == []
    refused("DSX-E402", diagnose_bundle, folder / "none")
    refused("DSX-E402", diagnose_bundle, _without_graph(bundle, folder))


def test_doctor_says_what_is_wrong_instead_of_a_traceback(bundle, folder):
    """TRT-8：manifest、图、engine.json 坏了各有说法。"""
    broken = folder / "broken"
    shutil.copytree(bundle.path, broken, ignore=shutil.ignore_patterns("engines"))
    record = broken / "engines/rtx-sm89/engine.json"
    record.parent.mkdir(parents=True)
    record.write_text("{", encoding="utf-8")
    assert diagnose_bundle(broken)["engines"][0]["problem"].startswith("DSX-E917 ")
    model = broken / "model.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)
    refused("DSX-E406", diagnose_bundle, broken)
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    refused("DSX-E403", diagnose_bundle, broken)


def _without_graph(bundle: Bundle, folder: Path) -> Path:
    copy = folder / "no-graph"
    copy.mkdir()
    shutil.copyfile(bundle.path / "manifest.json", copy / "manifest.json")
    return copy


def test_doctor_prints_the_plugins(bundle, built):
    """TRT-8：命令行的表与 JSON。"""
    result = CliRunner().invoke(doctor.command, [str(bundle.path)])
    assert "layers.1.mlp/MoeExperts" in result.output
    assert "rtx-sm89" in result.output
    result = CliRunner().invoke(doctor.command, [str(bundle.path), "--json"])
    assert json.loads(result.output)["bundle"]["path"] == str(bundle.path)


@pytest.mark.skipif(device_sm() is not None, reason="这台机器有 GPU")
def test_without_a_gpu_the_backend_is_refused(bundle):
    """TRT-9：没有 GPU 时 generate、verify、compare、load 各以同一个码一行拒绝，不先跑别的。"""
    refused("DSX-E918", deepseek_export.load, bundle.path, None, "trt")
    refused("DSX-E918", lambda: deepseek_export.verify(bundle.path, backend="trt"))
    refused("DSX-E918", lambda: deepseek_export.compare(bundle.path, backends=["ort", "trt"]))
    result = CliRunner().invoke(cli, ["generate", str(bundle.path), "--ids", "1,2", "--backend", "trt"])
    assert result.exit_code == 1
    assert "DSX-E918" in result.output


def test_engine_is_found_by_arch_and_checked(bundle, built, folder):
    """TRT-6：按当前的 SM 找引擎；没有的、与 bundle 不符的各有自己的码。"""
    directory, record = find_engine(bundle, 89)
    assert (directory, record.directory) == (built.path, "rtx-sm89")
    refused("DSX-E920", find_engine, bundle, 86)
    moved = folder / "changed"
    shutil.copytree(bundle.path, moved)
    manifest = moved / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "bundle 的哈希" in refused("DSX-E917", find_engine, Bundle.open(moved), 89).what


@pytest.fixture
def without_device(monkeypatch):
    """``dsx compare --backend trt`` 走到底，只有最后在 GPU 上执行的一步换成 ONNX Runtime；返回建出来的层。"""
    built = []

    def run(self, model, feeds):
        built.append(self.build(model, feeds)[1])
        return run_file(model, feeds)

    monkeypatch.setattr(CutEngines, "__call__", run)
    monkeypatch.setattr("deepseek_export.backend.tensorrt.cut.require_gpu", lambda: 89)
    return built


def test_compare_builds_an_engine_from_the_cut_graph(bundle, built, without_device, folder):
    """TRT-12：断开的图取自 bundle 的图，为当前的卡就地建成引擎，插件一个不少，prefill 的注意力照样融合。"""
    report = deepseek_export.compare(bundle.path, backends=["ort", "trt"], folder=folder / "compare")
    assert report.passed, report.first_failure
    found = {
        name: [(row.block, row.phase) for row in report.cases if row.backend == name]
        for name in ("ort", "trt")
    }
    assert found["ort"] == found["trt"]
    assert list(report.commands) == ["model.onnx", "model.trt.onnx"]
    ((prefill, decode),) = (list(layers.values()) for layers in without_device)
    config = bundle.manifest.model
    for layers in (prefill, decode):
        ops = Counter(layer.op for layer in layers if layer.op)
        assert ops == {"LatentAttention": config.num_hidden_layers, "MoeExperts": config.num_moe_layers}
    assert sum("mha" in layer.name for layer in prefill) == config.num_hidden_layers


@pytest.mark.slow
def test_compare_bisects_the_lowered_graph(bundle, built, without_device, folder):
    """TRT-12：trt 的块不对时，逐节点的定位也在下沉后的图上、用同一种引擎；打印的命令在 ONNX Runtime 上重复出同一个结果。"""

    def halve(model):
        node = find_node(model, NATIVE_ATTENTION, "layers.1.self_attn")
        set_float(node, "scale", next(a.f for a in node.attribute if a.name == "scale") / 2)

    bad = tampered(bundle, folder, edit_model(halve))
    refused("DSX-E917", lambda: deepseek_export.compare(bad.path, backends=["trt"]))
    build_for(bad, 89)
    report = deepseek_export.compare(bad.path, backends=["trt"], blocks=["1"], bisect=True)
    assert report.first_failure.block == "layers.1.self_attn"
    assert any(node.name == "layers.1.self_attn/mla/Attention" for node in report.culprit.nodes)
    assert len(without_device) == 2
    assert run_polygraphy(report.commands["model.trt.onnx"]).returncode == 1


def test_compare_is_refused_where_tensorrt_cannot_run(bundle, built, exported, monkeypatch):
    """TRT-12：float32 的、没有引擎的、只有插件核的、bfloat16 缓存的，各有自己的码，都在干活之前。"""
    monkeypatch.setattr("deepseek_export.backend.tensorrt.cut.require_gpu", lambda: 86)
    compare = functools.partial(deepseek_export.compare, backends=["trt"])
    refused("DSX-E920", compare, bundle.path)
    refused("DSX-E913", compare, exported("v3-yarn", "mla+moe", "tensorrt-rtx").path)
    manifest = bundle.manifest
    absorb = manifest.profile.mla.model_copy(update={"form": "absorb"})
    changes = (
        {"profile": manifest.profile.model_copy(update={"mla": absorb})},
        {"cache": manifest.cache.model_copy(update={"dtype": "bfloat16"})},
    )
    for change in changes:
        changed = dataclasses.replace(bundle, manifest=manifest.model_copy(update=change))
        refused("DSX-E614", backend_named("trt").cut_runner, changed)
