"""specs/cluster：一个 stage 一个引擎，导出时就切开，打包与查看一套 stage。GPU 是替身，见 tests/fake_gpu.py。"""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export import api
from deepseek_export.backend import backend_named
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster import local
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.engine.record import EngineRecord
from deepseek_export.engine.stages import stage_arches
from deepseek_export.machine import Gpu, Nvidia
from deepseek_export.model import CompiledModel
from tests.engines import refused
from tests.fake_gpu import FakeGpu
from tests.integration.cli import assert_refused, dsx, environment, last_json
from tests.stages import ThreadLauncher, loaded, write_five

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

ROWS = [[5, 9, 23, 100, 7], [44, 3, 2]]
RTX = {"target": "tensorrt-rtx", "dtype": "float16"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_five(tmp_path_factory.mktemp("engines") / "ck")


@pytest.fixture(scope="module")
def rtx(checkpoint: Path) -> Callable[[], StageSet]:
    """目标是 TensorRT-RTX 的，三个 stage。"""

    @functools.cache
    def make() -> StageSet:
        bundle = deepseek_export.export(checkpoint, checkpoint.with_name("rtx"), "full", **RTX)
        return deepseek_export.split(bundle.path, checkpoint.with_name("rtx-stages"), 3)

    return make


def without_engines(stages: StageSet, path: Path) -> StageSet:
    """另拷一份，别的测试建的引擎不带。"""
    shutil.copytree(stages.path, path, ignore=shutil.ignore_patterns("engines"))
    return StageSet.open(path)


def test_engines_of_stages_generate_the_same(rtx, monkeypatch):
    """CLUSTER-33：每个 stage 一个引擎，连起来的 token 与 ONNX Runtime 上的相同，投机的也是；能力取各个引擎里最窄的。"""
    gpu, stages = FakeGpu(monkeypatch), rtx()
    for directory, shapes in zip(stages.directories, ("T=128", "T=96", "T=128"), strict=True):
        gpu.build(Bundle.open(directory), shapes)
    record = EngineRecord.read(stages.directories[1] / "engines/rtx-sm89")
    assert record.shapes.capacity == 96
    with loaded(stages.path, speculative_floor=False) as model:
        want = {way: model.generate(ROWS, 12, speculative=way, ignore_eos=True) for way in (False, True)}
    backend, launcher = backend_named("trt"), ThreadLauncher(stages.directories, "trt")
    pipeline = PipelineBackend(stages, backend, ThreadLauncher.settings, launcher)
    assert pipeline.limits(stages.bundle).max_positions == 96
    with CompiledModel(stages.bundle, 1, pipeline, speculative_floor=False) as model:
        assert model.session.limits.max_positions == 96
        for way, found in want.items():
            assert model.generate(ROWS, 12, speculative=way, ignore_eos=True).token_ids == found.token_ids
    assert gpu.driver.counts["launch"] > 0


def test_a_stage_without_an_engine_says_so(rtx, tmp_path, monkeypatch):
    """CLUSTER-33：没有引擎的 stage，加载时就说，是哪个 stage、怎么办。"""
    stages = without_engines(rtx(), tmp_path / "stages")
    FakeGpu(monkeypatch)
    launcher = ThreadLauncher(stages.directories, "trt")
    pipeline = PipelineBackend(stages, backend_named("trt"), ThreadLauncher.settings, launcher)
    error = refused("DSX-E920", lambda: CompiledModel(stages.bundle, 1, pipeline))
    assert "stage." in error.todo


@pytest.mark.slow
def test_a_stage_without_a_gpu_says_so(rtx):
    """CLUSTER-33：没有 GPU 的机器，进程自己的错误码传得回来。"""
    error = refused("DSX-E918", lambda: deepseek_export.load(rtx().path, 1, "trt"))
    assert "stage " in error.what


def test_stages_of_one_machine_take_turns_on_its_gpus(rtx, monkeypatch):
    """CLUSTER-33：一台机器上几块 GPU，各 stage 轮流用，自己只看得见自己的；设过看得见哪几块的照办；只有一块就都用它。"""
    cards = (Gpu("A", 89, 1 << 30), Gpu("B", 120, 1 << 30))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local, "nvidia", lambda: Nvidia("580", cards))
    seen: list[dict[str, str]] = []

    def spawned(spec, environment):
        seen.append(dict(environment))
        raise OSError("只看它要怎么起")

    monkeypatch.setattr(local, "spawn", spawned)
    for backend in ("trt", "ort"):
        with pytest.raises(OSError, match="只看"):
            local.LocalLauncher(rtx().directories, backend).start(ThreadLauncher.settings)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in seen] == ["0", None]
    gpus = local.visible_gpus()
    assert [local.only_gpu(gpus, index)["CUDA_VISIBLE_DEVICES"] for index in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert local.only_gpu(local.visible_gpus(), 1)["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert local.only_gpu(local.visible_gpus(), 1) == {}


def test_each_stage_has_its_own_arch(rtx, checkpoint, tmp_path):
    """CLUSTER-33：SM 一个都用，或一个 stage 一个；建不了的图、不对的个数，动工之前说，带着整条命令。"""
    stages = rtx()
    assert stage_arches(stages, [89]) == [89, 89, 89]
    assert stage_arches(stages, [89, 120, 89]) == [89, 120, 89]
    error = refused("DSX-E736", lambda: stage_arches(stages, [89, 120]))
    assert "3 个 stage" in error.what
    plain = deepseek_export.split(
        deepseek_export.export(checkpoint, tmp_path / "out", "mla").path, tmp_path / "s", 2
    )
    error = refused("DSX-E735", lambda: api.build(plain.path, [89], flavour="rtx"))
    assert "--stages 2" in error.todo
    assert "--target tensorrt" in error.todo
    refused("DSX-E735", lambda: api.build(plain.directories[1], [89], flavour="rtx"))
    assert not list(plain.path.glob("*/engines"))


@pytest.mark.slow
def test_tensorrt_builds_every_stage(rtx, tmp_path):
    """CLUSTER-33：没有 GPU，TensorRT-RTX 真的给每个 stage 建引擎，各有各的 SM；查看时列得出来。"""
    without_engines(rtx(), tmp_path / "stages")
    found = last_json(dsx("build", tmp_path / "stages", "--arch", "89,120,89", "--json"))
    assert [(one["sm"], [*one["plans"]]) for one in found] == [
        (89, ["model.plan"]),
        (120, ["model.plan"]),
        (89, ["model.plan", "mtp.plan"]),
    ]
    listed = deepseek_export.inspect(tmp_path / "stages")["stages"]
    assert [one["engines"] for one in listed] == [["rtx-sm89"], ["rtx-sm120"], ["rtx-sm89"]]


def test_exported_and_split_in_one_go(checkpoint, tmp_path):
    """CLUSTER-34：``dsx export --stages`` 与先导出再切的相同，不留下整个的；给得不对的动工之前就说；不替换别人的东西。"""
    found = last_json(
        dsx("export", checkpoint, "-p", "mla", "--stages", "0-1,2-4", "-o", tmp_path / "one", "--json")
    )
    assert [item["layers"] for item in found["stages"]] == [[0, 1], [2, 3, 4]]
    assert found["nodes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    whole = deepseek_export.export(checkpoint, tmp_path / "whole", "mla")
    two = deepseek_export.split(whole.path, tmp_path / "two", "0-1,2-4")
    assert [item.manifest_sha256 for item in two.record.stages] == [
        item["manifest_sha256"] for item in found["stages"]
    ]
    done = dsx("export", checkpoint, "--stages", "9", "-o", tmp_path / "no")
    assert_refused(done, "DSX-E740")
    assert "5 层" in done.stderr
    assert_refused(dsx("export", checkpoint, "--balance", "time", "-o", tmp_path / "no"), "DSX-E740")
    refused("DSX-E401", lambda: api.export_stages(checkpoint, tmp_path / "one", 2, "mla"))
    refused("DSX-E401", lambda: api.export_stages(checkpoint, whole.path, 2, "mla", overwrite=True))
    made = api.export_stages(checkpoint, tmp_path / "one", 2, "mla", overwrite=True, weights="reference")
    assert len(made.directories) == 2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killed_while_exporting_stages(checkpoint, tmp_path):
    """CLUSTER-34：被 SIGKILL，OUT 不出现；再来一次就好，什么也不留下。"""
    command = [sys.executable, "-m", "deepseek_export", "export", str(checkpoint), "-p", "full"]
    command += ["--stages", "2", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("..out.whole.tmp-*")) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(StageSet.open(tmp_path / "out").directories) == 2


def test_a_referenced_set_can_be_packed(checkpoint, tmp_path):
    """CLUSTER-35：一套按引用的打包之后自包含、逐位相同；打包好的、坏了的拒绝，原样不动。"""
    made = api.export_stages(checkpoint, tmp_path / "stages", 2, "mla", weights="reference")
    with loaded(made.path) as model:
        want = model.generate(ROWS, 6, ignore_eos=True).token_ids
    found = last_json(dsx("pack", made.path, "--json"))
    assert len(found["stages"]) == 2
    packed = StageSet.open(made.path)
    assert all(Bundle.open(one).manifest.weights.mode == "packed" for one in packed.directories)
    assert not list(made.path.rglob("*.safetensors.index.json"))
    with loaded(made.path) as model:
        assert model.generate(ROWS, 6, ignore_eos=True).token_ids == want
    before = (made.path / "stages.json").read_bytes()
    refused("DSX-E409", lambda: api.pack_stages(made.path))
    assert (made.path / "stages.json").read_bytes() == before


def test_a_set_is_inspected_as_one_model(rtx):
    """CLUSTER-35：``dsx inspect`` 收一套 stage：整个模型的汇总，另有每个 stage 的层与权重；网页也写得出。"""
    stages = rtx()
    summary = deepseek_export.inspect(stages.path)
    whole = deepseek_export.inspect(stages.path.with_name("rtx"))
    assert summary["weights"] == whole["weights"]
    assert summary["cache"] == whole["cache"]
    assert [one["layers"] for one in summary["stages"]] == [item.layers for item in stages.record.stages]
    page = stages.path.with_name("page.html")
    done = dsx("inspect", stages.path, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "3 个 stage" in done.stdout
    assert "stage.2" in page.read_text(encoding="utf-8")
