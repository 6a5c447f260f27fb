"""specs/export 里与真实规模有关的承诺：FP8 检查点、按引用的权重、流式打包。"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.by_reference import BY_RECIPE_FILE
from deepseek_export.bundle.graph import check_onnx
from deepseek_export.bundle.packed import WEIGHTS_FILE, write_packed
from deepseek_export.checkpoint import Checkpoint, TensorStore
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.recipe import weight_recipes
from deepseek_export.cli import pack
from deepseek_export.dtypes import BY_SAFETENSORS
from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress
from deepseek_export.runtime import ModelSession
from tests.integration.cli import TINY
from tests.models import fp8_twins

pytestmark = pytest.mark.contract

FP8 = {
    **TINY,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [12, 20],
    },
}
IDS = list(range(3, 20))


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """FP8 检查点与它的 float32 孪生，都带 MTP 层。"""
    return fp8_twins(tmp_path_factory.mktemp("twins"), FP8, mtp=True)


@pytest.fixture(scope="module")
def twin_bundles(twins, tmp_path_factory) -> list[Bundle]:
    """两者打包的 ``full`` bundle；只读。"""
    out = tmp_path_factory.mktemp("twin-bundles")
    return [deepseek_export.export(path, out / path.name, "full") for path in twins]


@pytest.fixture(scope="module")
def referenced(twins, tmp_path_factory) -> list[Bundle]:
    """两者按引用的 ``full`` bundle；只读。"""
    out = tmp_path_factory.mktemp("referenced")
    return [deepseek_export.export(path, out / path.name, "full", weights="reference") for path in twins]


def prefill_logits(bundle: Bundle) -> np.ndarray:
    """一次 prefill 的全部 logits。"""
    session = deepseek_export.load(bundle.path, threads=1).session
    caches, positions = session.new_caches(1, len(IDS)), np.arange(len(IDS))[None]
    return session.run(np.array([IDS]), np.zeros(1, np.int64), positions, caches).copy()


def code_of(call: Callable, *arguments) -> str:
    with pytest.raises(DsxError) as error:
        call(*arguments)
    return error.value.code


@pytest.mark.heavy
def test_fp8_checkpoint_and_its_twin_give_the_same_logits(twin_bundles):
    """EXPORT-20：FP8 检查点与反量化的孪生，图、权重、logits 逐位相同；manifest 写明哪些配方要反量化。"""
    fp8, twin = twin_bundles
    for name in ("model.onnx", "mtp.onnx", WEIGHTS_FILE):
        assert fp8.manifest.files[name] == twin.manifest.files[name]
    assert np.array_equal(prefill_logits(fp8), prefill_logits(twin))
    recipes = fp8.manifest.weights.recipes
    assert recipes["model.layers.0.self_attn.o_proj.weight"].block_size == (12, 20)
    assert recipes["model.layers.2.mlp.experts.*.up_proj.weight"].block_size == (12, 20)
    assert recipes["model.layers.2.eh_proj.weight"].block_size is None
    assert {recipe.block_size for recipe in twin.manifest.weights.recipes.values()} == {None}


@pytest.mark.heavy
def test_fp8_bundle_equals_transformers(twin_bundles):
    """EXPORT-20：以 transformers 为基准，FP8 检查点导出的 bundle 在各层级都校验通过。"""
    report = deepseek_export.verify(twin_bundles[0].path, steps=8)
    assert report.first_failure is None
    assert report.oracle.startswith("transformers")


@pytest.mark.heavy
def test_reference_bundle_holds_no_weights_and_gives_the_same_logits(twins, twin_bundles, referenced):
    """EXPORT-21：按引用的 bundle 里的权重就是检查点的文件（同一个 inode），logits 与打包的逐位相同。"""
    for checkpoint, packed, bundle in zip(twins, twin_bundles, referenced, strict=True):
        assert bundle.manifest.weights.files == ["weights/model.safetensors"]
        assert (bundle.path / "weights/model.safetensors").samefile(checkpoint / "model.safetensors")
        assert bundle.manifest.weights.recipes == packed.manifest.weights.recipes
        assert np.array_equal(prefill_logits(bundle), prefill_logits(packed))
        tokens = [deepseek_export.load(b.path, threads=1).generate([IDS], 8) for b in (bundle, packed)]
        assert tokens[0].token_ids == tokens[1].token_ids
        assert tokens[0].speculation == tokens[1].speculation


@pytest.mark.heavy
def test_initializers_point_into_the_checkpoint_where_they_can(twins, referenced):
    """EXPORT-21：dtype 与布局相同的直接指到检查点里的偏移，其余（叠放、反量化）按配方生成。"""
    for checkpoint, bundle in zip(twins, referenced, strict=True):
        store = Checkpoint.open(checkpoint).store
        for path in (bundle.path / graph.file for graph in bundle.manifest.graphs):
            for tensor in onnx.load(path, load_external_data=False).graph.initializer:
                if tensor.name.startswith("constants/"):
                    continue
                direct = tensor.name in store and store[tensor.name].dtype == "F32"
                place = {entry.key: entry.value for entry in tensor.external_data}
                if direct:
                    spec = store[tensor.name]
                    want = {
                        "location": "weights/model.safetensors",
                        "offset": spec.offset,
                        "length": spec.nbytes,
                    }
                    assert place == {key: str(value) for key, value in want.items()}
                else:
                    assert place["location"] == BY_RECIPE_FILE
            check_onnx(path)


@pytest.mark.heavy
def test_main_and_draft_share_generated_weights(referenced):
    """EXPORT-21：主模型与草稿模型共用的权重只生成一次、只占一份内存。"""
    bundle = referenced[0]
    weights = BundleWeights(bundle)
    main, draft = (weights.arrays(graph.by_recipe) for graph in bundle.manifest.graphs)
    assert main
    assert draft
    for name in main.keys() & draft.keys():
        assert main[name] is draft[name]
    again = weights.arrays(bundle.manifest.main.by_recipe)
    assert all(again[name] is main[name] for name in main)


@pytest.mark.heavy
def test_reference_bundle_passes_parity(referenced):
    """EXPORT-21：按引用的 bundle 同样能 dsx verify；Polygraphy 不会按配方生成，所以不给出命令。"""
    report = deepseek_export.verify(referenced[0].path, steps=4)
    assert report.first_failure is None
    assert report.polygraphy is None


@pytest.mark.heavy
def test_plain_onnxruntime_refuses_instead_of_reading_garbage(referenced):
    """EXPORT-21：绕过 dsx 直接加载会报错，不会把别的字节当作权重；ModelSession 的报错说怎么办。"""
    path = referenced[0].model_path
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="out of bounds"):
        ort.InferenceSession(str(path), options)
    with pytest.raises(DsxError, match="dsx pack") as error:
        ModelSession(OrtRunner(path, max_positions=16))
    assert error.value.code == "DSX-E507"
    assert "dsx pack" in (referenced[0].path / BY_RECIPE_FILE).read_text(encoding="utf-8")


def copy_of(bundle: Bundle, out: Path) -> Path:
    """按引用的 bundle 的副本；权重也复制，改它不影响检查点。"""
    return shutil.copytree(bundle.path, out)


@pytest.mark.heavy
@pytest.mark.parametrize("change", ["header", "size", "missing"])
def test_changed_checkpoint_is_refused_at_load(referenced, tmp_path: Path, change: str):
    """EXPORT-22：检查点的大小、文件头变了，或文件没了，加载时按码拒绝。"""
    path = copy_of(referenced[0], tmp_path / "out")
    file = path / "weights/model.safetensors"
    raw = file.read_bytes()
    if change == "missing":
        file.unlink()
    elif change == "size":
        file.write_bytes(raw + bytes(8))
    else:
        file.write_bytes(raw.replace(b'"format":"pt"', b'"format":"xx"', 1))
    code = {"header": "DSX-E408", "size": "DSX-E110", "missing": "DSX-E402"}[change]
    assert code_of(deepseek_export.load, path) == code


@pytest.mark.heavy
def test_another_shard_set_is_refused_at_load(referenced, twins, tmp_path: Path):
    """EXPORT-22：换成另一个合法的检查点也拒绝，而不是拿它的权重来用。"""
    path = copy_of(referenced[0], tmp_path / "out")
    shutil.copyfile(twins[1] / "model.safetensors", path / "weights/model.safetensors")
    assert code_of(deepseek_export.load, path) == "DSX-E408"


@pytest.mark.heavy
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_small_weights_are_checked_at_a_reference_export(twins, tmp_path: Path, value: float):
    """EXPORT-21：直接指进检查点的 norm 里有 NaN、Inf，按引用导出时就拒绝，不等到打包。"""
    checkpoint = shutil.copytree(twins[1], tmp_path / "ckpt")
    spec = TensorStore.open(checkpoint)["model.layers.1.input_layernorm.weight"]
    with spec.file.open("r+b") as stream:
        stream.seek(spec.offset + 12)
        stream.write(np.float32(value).tobytes())
    with pytest.raises(DsxError, match=r"layers.1.input_layernorm.weight\[3\]") as error:
        deepseek_export.export(checkpoint, tmp_path / "out", "full", weights="reference")
    assert error.value.code == "DSX-E115"
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_data_rewritten_in_place_is_refused(referenced, tmp_path: Path):
    """EXPORT-22：文件头一字未改、只有一个张量的数据被就地重写，加载与打包都拒绝，不会悄悄换了权重。"""
    path = copy_of(referenced[0], tmp_path / "out")
    spec = TensorStore.open(path / "weights")["model.norm.weight"]
    with spec.file.open("r+b") as stream:
        stream.seek(spec.offset)
        scaled = np.frombuffer(stream.read(spec.nbytes), BY_SAFETENSORS[spec.dtype].numpy) * 2
        stream.seek(spec.offset)
        stream.write(scaled.tobytes())
    for call in (deepseek_export.load, deepseek_export.pack):
        with pytest.raises(DsxError, match="的数据与导出时不同") as error:
            call(path)
        assert error.value.code == "DSX-E408"


@pytest.mark.heavy
def test_manifest_without_samples_is_refused(referenced, tmp_path: Path):
    """EXPORT-22：旧的 manifest 没有数据的哈希，要重新导出。"""
    path = copy_of(referenced[0], tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["source"]["fingerprint"]["files"]:
        del entry["samples_sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert code_of(Bundle.open, path) == "DSX-E403"


@pytest.mark.heavy
def test_other_file_system_is_refused(twins, tmp_path: Path):
    """EXPORT-22：检查点在另一个文件系统上，硬链接做不成：DSX-E407，不留半成品。"""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("没有第二个可写的文件系统")
    out = shared / f"dsx-test-{os.getpid()}"
    assert code_of(lambda: deepseek_export.export(twins[1], out, "full", weights="reference")) == "DSX-E407"
    assert not list(shared.glob(f"*dsx-test-{os.getpid()}*"))


@pytest.mark.heavy
def test_pack_equals_a_packed_export(referenced, twin_bundles, tmp_path: Path):
    """EXPORT-23：dsx pack 的结果与一开始就打包导出的逐字节相同；已打包的不能再打包。"""
    path = copy_of(referenced[0], tmp_path / "out")
    printed = CliRunner().invoke(pack.command, [str(path), "--json"])
    packed = Bundle.open(path)
    assert json.loads(printed.stdout)["sha256"] == packed.manifest.files[WEIGHTS_FILE].sha256
    assert packed.manifest.files == twin_bundles[0].manifest.files
    assert packed.manifest.weights == twin_bundles[0].manifest.weights
    assert (path / "reports/export.json").is_file()
    packed.check_weights(Progress())
    assert code_of(deepseek_export.pack, path) == "DSX-E409"
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    again = copy_of(referenced[1], tmp_path / "again")
    assert "已打包" in CliRunner().invoke(pack.command, [str(again)]).stdout


class Killed(Progress):
    """写到给定的字节数时 SIGKILL 自己。"""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, amount: int = 1, detail: str = "") -> None:
        self.left -= amount
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Counted(Progress):
    """记下接着上一次的有多少字节。"""

    resumed = 0
    line = ""

    def note(self, line: str) -> None:
        self.line = line

    def advance(self, amount: int = 1, detail: str = "") -> None:
        self.resumed += amount if detail == "接着上一次" else 0


def write_in_child(directory: Path, checkpoint: Checkpoint, after: int) -> None:
    """子进程里写权重，写到 ``after`` 字节时被 SIGKILL。"""
    child = os.fork()
    if child == 0:
        recipes = bind_recipes(weight_recipes(checkpoint.config, "float32"), checkpoint)
        write_packed(directory, recipes, checkpoint.store, Killed(after), sync_bytes=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_resumes_after_sigkill_at_any_moment(twins, tmp_path: Path):
    """EXPORT-24：在任何时候被 SIGKILL，再跑一次接着写，sha256 与一次写完的相同；写过的不重写。"""
    checkpoint = Checkpoint.open(twins[0])
    recipes = bind_recipes(weight_recipes(checkpoint.config, "float32"), checkpoint)
    total = sum(recipe.nbytes for recipe in recipes.values())
    (tmp_path / "once").mkdir()
    want = write_packed(tmp_path / "once", recipes, checkpoint.store, Progress())
    for fraction in (0.0, 0.1, 0.5, 0.9, 0.999):
        directory = tmp_path / str(fraction)
        directory.mkdir()
        write_in_child(directory, checkpoint, int(total * fraction))
        counted = Counted()
        assert write_packed(directory, recipes, checkpoint.store, counted) == want
        assert (directory / WEIGHTS_FILE).read_bytes() == (tmp_path / "once" / WEIGHTS_FILE).read_bytes()
        assert (counted.resumed > 0) == (fraction >= 0.5) == ("接着上一次" in counted.line)


def test_resumes_after_being_killed_twice(twins, tmp_path: Path):
    """EXPORT-24：接着写的时候又被杀，第三次仍然写完。"""
    checkpoint = Checkpoint.open(twins[0])
    recipes = bind_recipes(weight_recipes(checkpoint.config, "float32"), checkpoint)
    total = sum(recipe.nbytes for recipe in recipes.values())
    once = tmp_path / "once"
    once.mkdir()
    want = write_packed(once, recipes, checkpoint.store, Progress())
    for fraction in (0.4, 0.8):
        write_in_child(tmp_path, checkpoint, int(total * fraction))
    assert write_packed(tmp_path, recipes, checkpoint.store, Progress()) == want


@pytest.mark.parametrize("reason", ["dtype", "torn", "truncated", "checkpoint"])
def test_unusable_leftovers_start_over(twins, tmp_path: Path, reason: str):
    """EXPORT-24：配方变了、日志残缺、权重不够长、检查点动过，都从头写，结果不变。"""
    checkpoint = Checkpoint.open(shutil.copytree(twins[0], tmp_path / "ckpt"))
    write_in_child(tmp_path, checkpoint, 40_000)
    dtype = "float16" if reason == "dtype" else "float32"
    if reason == "torn":
        journal = tmp_path / ".resume.json"
        journal.write_bytes(journal.read_bytes()[:-9])
    elif reason == "truncated":
        os.truncate(tmp_path / WEIGHTS_FILE, 100)
    elif reason == "checkpoint":
        os.utime(checkpoint.path / "model.safetensors", (1, 1))
    recipes = bind_recipes(weight_recipes(checkpoint.config, dtype), checkpoint)
    counted = Counted()
    got = write_packed(tmp_path, recipes, checkpoint.store, counted)
    assert counted.resumed == 0
    once = tmp_path / "once"
    once.mkdir()
    assert got == write_packed(once, recipes, checkpoint.store, Progress())
