"""specs/tensorrt 的 TRT-5、TRT-8、TRT-9：图不能直接建引擎的 bundle，由检查点另导出一份来建。"""

from __future__ import annotations

import functools
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cli.bundle_plugins import diagnose_bundle
from deepseek_export.cli.demo import CHECKPOINT as DEMO
from deepseek_export.engine.build import build_engine
from deepseek_export.engine.derived import buildable_bundle, derived_folder, engine_bundle
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.engine.record import ENGINES, EngineRecord
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.progress import Progress
from tests.contract.test_mtp_contract import SMALL
from tests.engines import refused
from tests.fake_gpu import FakeGpu
from tests.integration.cli import assert_refused, dsx, last_json

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

RTX = FLAVOURS["rtx"]
SHAPES = "T=128"
PROMPTS = [[5, 9, 23, 100, 7], [44, 3, 2]]
#: 宽度够分一块 32 的，int8 才量化得了。
CONFIG = SMALL | {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
#: 名字 → 怎么导出。
UNBUILDABLE = {
    "portable": {"profile": "full", "dtype": "float16"},
    "float32": {"profile": "full"},
    "float32, tensorrt": {"profile": "mla+moe", "target": "tensorrt"},
    "ort-cpu": {"profile": "mla+moe", "target": "ort-cpu", "dtype": "float16"},
    "int8": {
        "profile": "mla+moe",
        "target": "ort-cpu",
        "quantization": Quantization(kind="int8", block=32, keep=("lm_head",)),
    },
    "int8 cache": {"profile": "mla+moe", "dtype": "float16", "overrides": ["mla.cache_dtype=int8"]},
    "float32, int8 cache": {"profile": "mla+moe", "overrides": ["mla.cache_dtype=int8"]},
    "reference": {"profile": "mla+moe", "dtype": "float16", "weights": "reference"},
}


class Notes(Progress):
    """记下必须让用户看到的话。"""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("derived") / "ck", CONFIG, dtype="float32", mtp=True)


@pytest.fixture(scope="module")
def float32(checkpoint, tmp_path_factory) -> Bundle:
    """还没有另导出过的 float32 bundle。"""
    return deepseek_export.export(checkpoint, tmp_path_factory.mktemp("float32") / "out", "full")


def copy_of(bundle: Bundle, out: Path) -> Bundle:
    shutil.copytree(bundle.path, out)
    return Bundle.open(out)


@pytest.mark.parametrize("name", UNBUILDABLE)
def test_any_bundle_becomes_buildable(name, checkpoint, tmp_path):
    """TRT-5：同样的方案与量化、同一个检查点，能建的 dtype 与缓存；原因说出来、记进 fallbacks；权重的放法随原来的；校验得过。"""
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", **UNBUILDABLE[name])
    refused("DSX-E920", engine_bundle, bundle)
    notes = Notes()
    derived = buildable_bundle(bundle, RTX, progress=notes)
    old, new = bundle.manifest, derived.manifest
    assert derived.path == derived_folder(bundle)
    assert (new.target, new.dtype) == ("tensorrt-rtx", "float16")
    assert new.cache.dtype == ("int8" if old.cache.dtype == "int8" else "float16")
    assert (new.model, new.source, new.weights.mode) == (old.model, old.source, old.weights.mode)
    assert [(graph.file, graph.role) for graph in new.graphs] == [(g.file, g.role) for g in old.graphs]
    assert new.profile.name == old.profile.name
    assert new.profile.mla.form == old.profile.mla.form
    kept = [
        None if m.quantization is None else (m.quantization.kind, m.quantization.keep) for m in (old, new)
    ]
    assert kept[0] == kept[1]
    assert new.fallbacks[0] in notes.lines
    assert engine_bundle(bundle) == derived
    assert deepseek_export.verify(derived.path, levels=["block", "model"]).passed


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    """TRT-5：没有说要 float16 的，检查点是 bfloat16 就是 bfloat16（激活放不进 float16）；说了的照说的。"""
    checkpoint = write_checkpoint(tmp_path / "ck", CONFIG, dtype="bfloat16")
    for asked, want in (("float32", "bfloat16"), ("float16", "float16")):
        bundle = deepseek_export.export(checkpoint, tmp_path / asked, "mla+moe", dtype=asked)
        derived = buildable_bundle(bundle, RTX)
        assert (derived.manifest.dtype, derived.manifest.cache.dtype) == (want, want)
        assert f"（{want}）" in derived.manifest.fallbacks[0]
        assert engine_bundle(bundle) == derived


def test_one_road_to_an_engine(checkpoint, tmp_path):
    """TRT-5：TensorRT 目标的直接建，两种发行都收；portable 另导出的与直接导出的逐字节是同一张图、同一份权重。"""
    options = {"profile": "full", "dtype": "float16"}
    portable = deepseek_export.export(checkpoint, tmp_path / "portable", **options)
    direct = deepseek_export.export(checkpoint, tmp_path / "rtx", target="tensorrt-rtx", **options)
    assert buildable_bundle(direct, RTX) is buildable_bundle(direct, FLAVOURS["tensorrt"]) is direct
    assert engine_bundle(direct) is direct
    assert not derived_folder(direct).exists()
    assert buildable_bundle(portable, RTX).manifest.files == direct.manifest.files


def test_derived_once_and_again_when_it_is_out_of_date(float32, tmp_path):
    """TRT-5：另导出过而没有过时的直接用；不是由这个 bundle 的方案来的，当作没有，重新导出，连同它里面的引擎。"""
    bundle = copy_of(float32, tmp_path / "out")
    manifest = buildable_bundle(bundle, RTX).path / "manifest.json"
    written, notes = manifest.stat().st_mtime_ns, Notes()
    assert buildable_bundle(bundle, RTX, progress=notes).path == manifest.parent
    assert manifest.stat().st_mtime_ns == written
    assert notes.lines == buildable_bundle(bundle, RTX).manifest.fallbacks[:1]
    (manifest.parent / "engines").mkdir()
    profile = bundle.manifest.profile
    drafts = profile.mtp.num_draft_tokens + 1
    mtp = profile.mtp.model_copy(update={"num_draft_tokens": drafts})
    changed = Bundle(
        bundle.path,
        bundle.manifest.model_copy(update={"profile": profile.model_copy(update={"mtp": mtp})}),
    )
    refused("DSX-E920", engine_bundle, changed)
    assert buildable_bundle(changed, RTX).manifest.profile.mtp.num_draft_tokens == drafts
    assert not (manifest.parent / "engines").exists()


def test_a_broken_derived_bundle_is_made_again(float32, tmp_path):
    """TRT-5：另导出的那一份坏了，再 ``dsx build`` 就好；那个位置上是别的东西则不碰它。"""
    bundle = copy_of(float32, tmp_path / "out")
    derived = buildable_bundle(bundle, RTX)
    (weights,) = derived.manifest.weights.files
    (derived.path / weights).write_bytes(b"short")
    refused("DSX-E920", engine_bundle, bundle)
    assert diagnose_bundle(bundle.path)["derived"] is False
    assert buildable_bundle(bundle, RTX).manifest == derived.manifest
    assert engine_bundle(bundle).manifest == derived.manifest
    (derived.path / "manifest.json").unlink()
    assert "移开" in refused("DSX-E401", buildable_bundle, bundle, RTX).todo
    assert (derived.path / weights).is_file()


def test_what_cannot_be_derived_comes_with_the_command(checkpoint, tmp_path):
    """TRT-5：float16 放不下的权重、TensorRT 的目标上一个也量化不了的，附自己导出的整条命令，照着做得成。"""
    copy = tmp_path / "ck"
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e6
    save_file(tensors, copy / "model.safetensors")
    large = deepseek_export.export(copy, tmp_path / "large", "mla", overrides=["mla.form=naive"])
    narrow = write_checkpoint(tmp_path / "narrow", SMALL, dtype="float32", mtp=True)
    options = {"target": "ort-cpu", "quantization": Quantization(kind="int8", block=32)}
    unquantised = deepseek_export.export(narrow, tmp_path / "int8", "mla+moe", **options)
    for code, bundle, expected in (
        ("DSX-E116", large, ("bfloat16", None)),
        ("DSX-E313", unquantised, ("float16", None)),
    ):
        todo = refused(code, buildable_bundle, bundle, RTX).todo
        assert not derived_folder(bundle).exists()
        command = shlex.split(todo.partition("：")[2])
        assert command[0] == "dsx"
        assert dsx(*command[1:]).returncode == 0
        made = Bundle.open(command[-1])
        assert (made.manifest.dtype, made.manifest.quantization) == expected
        assert made.manifest.profile == bundle.manifest.profile
        assert buildable_bundle(made, RTX) is made


def test_doctor_sees_a_checkpoint_changed_under_the_bundle(checkpoint, tmp_path):
    """TRT-8：按引用的，检查点就地改过，``dsx build`` 会拒绝，doctor 事先就说。"""
    copy = tmp_path / "ck"
    shutil.copytree(checkpoint, copy)
    bundle = deepseek_export.export(copy, tmp_path / "out", "mla+moe", weights="reference")
    assert diagnose_bundle(bundle.path)["refusal"] is None
    buildable_bundle(bundle, RTX)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-400_000, 2)
        file.write(bytes(400_000))
    assert diagnose_bundle(bundle.path)["refusal"]["code"] == "DSX-E408"


def test_packing_keeps_the_derived_bundle_linked(checkpoint, tmp_path):
    """EXPORT-23：``dsx pack`` 不把 engines/ 里权重的硬链接变成一份份的复制品。"""
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", weights="reference")
    (weights,) = (name for name in buildable_bundle(bundle, RTX).manifest.weights.files)
    deepseek_export.pack(bundle.path)
    assert (derived_folder(bundle) / weights).samefile(checkpoint / "model.safetensors")
    assert engine_bundle(Bundle.open(bundle.path)).path == derived_folder(bundle)


def test_the_checkpoint_has_to_be_there_and_the_same(float32, checkpoint, tmp_path):
    """TRT-5：检查点不在了（``--checkpoint`` 另指）、换了，都按码拒绝，不留半份；doctor 事先就说。"""
    bundle = copy_of(float32, tmp_path / "out")
    source = bundle.manifest.source.model_copy(update={"path": str(tmp_path / "gone")})
    moved = Bundle(bundle.path, bundle.manifest.model_copy(update={"source": source}))
    (bundle.path / "manifest.json").write_text(moved.manifest.model_dump_json(), encoding="utf-8")
    process = dsx("build", bundle.path, "--arch", "sm89")
    assert_refused(process, "DSX-E601")
    assert "目标是 portable" in process.stderr
    assert "--checkpoint" in process.stderr
    assert diagnose_bundle(bundle.path)["refusal"]["code"] == "DSX-E601"
    other = write_checkpoint(tmp_path / "other", CONFIG, dtype="float32", mtp=True, seed=7)
    assert_refused(dsx("build", bundle.path, "--arch", "sm89", "--checkpoint", other), "DSX-E602")
    assert not derived_folder(bundle).exists()
    assert buildable_bundle(moved, RTX, checkpoint).manifest.source.path == str(checkpoint.resolve())
    notes = Notes()
    buildable_bundle(moved, RTX, checkpoint, notes)
    assert "--checkpoint 用不到" in notes.lines[0]
    refused("DSX-E602", buildable_bundle, moved, RTX, other)
    shutil.rmtree(derived_folder(bundle))
    replaced = bundle.manifest.source.model_copy(update={"path": str(other)})
    stale = bundle.manifest.model_copy(update={"source": replaced})
    (bundle.path / "manifest.json").write_text(stale.model_dump_json(), encoding="utf-8")
    assert diagnose_bundle(bundle.path)["refusal"]["code"] == "DSX-E602"


def test_the_graph_itself_is_still_refused(float32):
    """TRT-5：绕过另导出、直接拿去建的，按码拒绝，不悄悄换一个。"""
    shapes = ProfileShapes.parse(SHAPES, CONFIG["max_position_embeddings"])
    what = refused("DSX-E913", build_engine, float32, 89, RTX, shapes).what
    assert "目标是 portable" in what
    assert "float32" in what


def test_build_command_and_doctor_follow_the_derived_bundle(float32, tmp_path):
    """TRT-5、TRT-8：``dsx build`` 一条命令建好；doctor 在此之前说会另导出，之后看的是那一份和它里面的引擎。"""
    bundle = copy_of(float32, tmp_path / "out")
    before = diagnose_bundle(bundle.path)
    assert (before["ok"], before["derived"], before["refusal"]) == (True, False, None)
    assert "float32" in before["reason"]
    process = dsx("build", bundle.path, "--arch", "sm89", "--profile-shapes", SHAPES, "--json")
    assert process.returncode == 0, process.stderr
    assert "float32" in process.stderr
    (built,) = last_json(process)
    folder = derived_folder(bundle) / "engines/rtx-sm89"
    assert built["path"] == str(folder)
    assert sorted(EngineRecord.read(folder).plans) == ["model.plan", "mtp.plan"]
    after = diagnose_bundle(bundle.path)
    assert (after["ok"], after["derived"], after["dtype"]) == (True, True, "float16")
    assert after["reason"] == before["reason"]
    assert [engine["directory"] for engine in after["engines"]] == ["rtx-sm89"]
    shown = dsx("doctor", bundle.path).stdout
    assert "另导出的这一份" in shown


def test_build_from_python(float32, tmp_path, monkeypatch):
    """TRT-5：``deepseek_export.build`` 就是 ``dsx build``：另导出、每种 SM 一个引擎；有一种建不了，什么都不动；没有证据能运行的说一句。"""
    bundle = copy_of(float32, tmp_path / "out")
    build = functools.partial(deepseek_export.build, bundle.path)
    refused("DSX-E912", build, [89, 90])
    refused("DSX-E919", lambda: build([89], shapes="T=1"))
    refused("DSX-E602", lambda: build([89], checkpoint=DEMO))
    assert not (bundle.path / ENGINES).exists()
    FakeGpu(monkeypatch)
    told = Notes()
    engines = build([89, 80, 89], flavour="rtx", shapes=SHAPES, progress=told)
    assert [line for line in told.lines if "没有证据" in line and "sm80" in line]
    assert not [line for line in told.lines if "没有证据" in line and "sm89" in line]
    assert [engine.record.sm for engine in engines] == [89, 80]
    assert all(engine.record.shapes.capacity == 128 for engine in engines)
    assert {engine.bundle.path for engine in engines} == {derived_folder(bundle)}
    assert [engine.path.parent for engine in engines] == [derived_folder(bundle) / ENGINES] * 2


def test_the_backend_finds_the_derived_engine(float32, tmp_path, monkeypatch):
    """TRT-9：``--backend trt`` 给原来的 bundle 就行：token 与那一份在 ONNX Runtime 上的相同，校验的也是那一份；没有建过按码拒绝。"""
    bundle = copy_of(float32, tmp_path / "out")
    gpu = FakeGpu(monkeypatch)
    refused("DSX-E920", deepseek_export.load, bundle.path, None, "trt")
    derived = buildable_bundle(bundle, RTX)
    refused("DSX-E920", deepseek_export.load, bundle.path, None, "trt")
    gpu.build(derived, SHAPES)
    there = deepseek_export.load(bundle.path, backend="trt")
    assert there.bundle == derived
    here = deepseek_export.load(derived.path)
    for speculative in (False, None):
        found = [model.generate(PROMPTS, 16, speculative=speculative).token_ids for model in (here, there)]
        assert found[0] == found[1]
    report = deepseek_export.verify(bundle.path, levels=["model"], backend="trt")
    assert report.passed
    assert (derived.path / "reports/parity.json").is_file()
    compared = refused("DSX-E913", lambda: deepseek_export.compare(bundle.path, backends=["trt"]))
    assert str(derived.path) in compared.todo
