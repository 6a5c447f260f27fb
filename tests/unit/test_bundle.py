"""bundle：打包的权重、原子写入、manifest、外部数据。"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from safetensors.numpy import load_file

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.by_reference import link_checkpoint
from deepseek_export.bundle.description import ExportSettings
from deepseek_export.bundle.disk import (
    atomic_directory,
    check_free_space,
    check_output,
    disk_errors,
    output_lock,
    output_path,
)
from deepseek_export.bundle.export import export_bundle
from deepseek_export.bundle.packed import write_packed
from deepseek_export.checkpoint import Checkpoint, TensorStore
from deepseek_export.checkpoint.recipe import CHUNK_BYTES, load_array, materialize, weight_recipes
from deepseek_export.checkpoint.synthetic import DEMO_CONFIG, write_checkpoint
from deepseek_export.errors import DsxError
from deepseek_export.profile import resolve_profile
from deepseek_export.progress import Progress
from tests.integration.cli import TINY
from tests.permissions import permissions_apply

pytestmark = pytest.mark.unit


def code_of(call, *args, **kwargs) -> str:
    with pytest.raises(DsxError) as error:
        call(*args, **kwargs)
    return error.value.code


def test_weights_file_is_standard_safetensors_and_equals_the_recipes(v3_checkpoint: Path, v3_bundle: Bundle):
    """权重文件用 safetensors 库能打开，内容与配方逐位相同，数据区 64 字节对齐。"""
    stored = load_file(v3_bundle.path / "weights/model.safetensors")
    recipes = v3_bundle.manifest.weights.recipes
    assert set(stored) == set(recipes)
    store = Checkpoint.open(v3_checkpoint).store
    for name, recipe in recipes.items():
        np.testing.assert_array_equal(stored[name], load_array(name, recipe, store))
    header = int.from_bytes((v3_bundle.path / "weights/model.safetensors").open("rb").read(8), "little")
    assert (8 + header) % 64 == 0


def test_external_data_offsets_point_at_the_right_bytes(v3_bundle: Bundle):
    """onnx 按偏移读到的权重与 safetensors 读到的相同；initializer 名就是检查点名。"""
    stored = load_file(v3_bundle.path / "weights/model.safetensors")
    model = onnx.load(v3_bundle.model_path)
    weights = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("constants/")]
    assert {tensor.name for tensor in weights} == set(stored)
    assert "model.layers.1.mlp.experts.*.gate_proj.weight" in stored
    for tensor in weights:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), stored[tensor.name])


def test_manifest_round_trips_and_covers_every_file(v3_bundle: Bundle):
    """manifest 读写无损；除自身与 reports 之外的文件都在 files 里，哈希相符。"""
    text = (v3_bundle.path / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text) == v3_bundle.manifest.model_dump(mode="json")
    found = {p.relative_to(v3_bundle.path).as_posix() for p in v3_bundle.path.rglob("*") if p.is_file()}
    uncovered = {name for name in found if name not in v3_bundle.manifest.files}
    assert {name for name in uncovered if not name.startswith("reports/")} == {"manifest.json"}
    v3_bundle.check_weights(Progress())


def test_export_is_reproducible(v3_checkpoint: Path, v3_bundle: Bundle, tmp_path: Path):
    """同样的输入导出两次，模型与权重逐位相同。"""
    again = export_bundle(v3_checkpoint, tmp_path / "again", ExportSettings(v3_bundle.manifest.profile))
    for name in ("model.onnx", "weights/model.safetensors"):
        assert again.manifest.files[name] == v3_bundle.manifest.files[name]


def test_cache_entry_counts_576_values_per_token_and_layer(v3_bundle: Bundle):
    """manifest 的缓存算术：r+dr 个数，乘层数乘字节数。"""
    cache, config = v3_bundle.manifest.cache, v3_bundle.manifest.model
    assert cache.values_per_token_per_layer == config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.bytes_per_token == cache.values_per_token_per_layer * config.num_hidden_layers * 4


def test_mtp_without_mtp_weights_is_refused(v3_checkpoint: Path, tmp_path: Path):
    """transformers 存的检查点 config 里写着 num_nextn_predict_layers 而没有权重：-p mla 可以，-p mtp 拒绝。"""
    assert Checkpoint.open(v3_checkpoint).config.num_mtp_layers == 1
    assert (
        code_of(export_bundle, v3_checkpoint, tmp_path / "out", ExportSettings(resolve_profile("full")))
        == "DSX-E119"
    )
    assert not (tmp_path / "out").exists()


class TestOpen:
    """打开 bundle 时的核对。"""

    def copy(self, bundle: Bundle, tmp_path: Path) -> Path:
        target = tmp_path / "copy"
        for path in bundle.path.rglob("*"):
            if path.is_file():
                destination = target / path.relative_to(bundle.path)
                destination.parent.mkdir(parents=True, exist_ok=True)
                destination.write_bytes(path.read_bytes())
        return target

    def test_not_a_bundle(self, tmp_path: Path):
        assert code_of(Bundle.open, tmp_path) == "DSX-E402"

    @pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 99}', '{"schema_version": 1}', "\xff"])
    def test_broken_manifest(self, tmp_path: Path, text: str):
        (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
        assert code_of(Bundle.open, tmp_path) == "DSX-E403"

    def edited(self, bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
        """拷贝一份，只改 manifest。"""
        path = self.copy(bundle, tmp_path)
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return path

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda m: m.update(graphs=[]), "graphs 里有 0 个主模型"),
            (lambda m: m["graphs"].append(m["graphs"][0]), "graphs 里有 2 个主模型"),
            (
                lambda m: m["graphs"][0].update(file="../copy/model.onnx"),
                "graphs.0.file：'../copy/model.onnx'",
            ),
            (lambda m: m["graphs"][0].update(file="none.onnx"), "none.onnx 不在 files 里"),
            (lambda m: m["graphs"][0].update(role="other"), "graphs.0.role："),
            (
                lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
                "'/etc/passwd' 不是 bundle",
            ),
            (
                lambda m: m["files"].update({"./model.onnx": {"bytes": 1, "sha256": ""}}),
                "'./model.onnx' 不是 bundle",
            ),
            (lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": ""}}), "不是 bundle"),
            (lambda m: m["weights"].update(files=[""]), "weights.files.0：'' 不是 bundle"),
            (lambda m: m["weights"].update(files=["weights/../../x"]), "weights.files.0："),
            (lambda m: m.update(target="zzz"), "target：没有目标 'zzz'"),
            (lambda m: m["model"].update(num_hidden_layers=-3), "model.num_hidden_layers 是 -3"),
            (lambda m: m["model"]["rope"].update(theta=0.5), "model.rope"),
            (lambda m: m.pop("cache"), "cache：没有这个字段"),
            (lambda m: m.update(more=1), "more：不认识这个字段"),
        ],
    )
    def test_a_manifest_that_does_not_hold(self, change, said, v3_bundle: Bundle, tmp_path: Path):
        """内容不成立的打开时就拒绝，点名哪个字段、怎么不对，不留到用的时候才崩。"""
        path = self.edited(v3_bundle, tmp_path, change)
        with pytest.raises(DsxError) as error:
            Bundle.open(path)
        assert error.value.code == "DSX-E403"
        assert said in error.value.what
        assert "\n" not in error.value.what

    def test_config_that_cannot_be_a_model(self, v3_bundle: Bundle, tmp_path: Path):
        """manifest 没有列出 config.json 也一样要有。"""
        path = self.edited(v3_bundle, tmp_path, lambda m: m["files"].pop("config.json"))
        (path / "config.json").unlink()
        with pytest.raises(DsxError, match=r"config\.json") as error:
            Bundle.open(path)
        assert error.value.code == "DSX-E403"

    def test_a_file_is_not_called_an_empty_folder(self, v3_bundle: Bundle, tmp_path: Path):
        for path, said in ((v3_bundle.model_path, "不是目录"), (tmp_path / "none", "不存在")):
            with pytest.raises(DsxError, match=said) as error:
                Bundle.open(path)
            assert error.value.code == "DSX-E402"

    @pytest.mark.parametrize(
        ("name", "code"), [("manifest.json", "DSX-E403"), ("model.onnx", "DSX-E402"), (".", "DSX-E402")]
    )
    def test_no_permission(self, name: str, code: str, v3_bundle: Bundle, tmp_path: Path):
        path = self.copy(v3_bundle, tmp_path)
        (path / name).chmod(0)
        with permissions_apply():
            assert code_of(Bundle.open, path) == code
        path.chmod(0o700)

    def test_missing_file(self, v3_bundle: Bundle, tmp_path: Path):
        path = self.copy(v3_bundle, tmp_path)
        (path / "weights/model.safetensors").unlink()
        assert code_of(Bundle.open, path) == "DSX-E402"

    def test_truncated_file(self, v3_bundle: Bundle, tmp_path: Path):
        path = self.copy(v3_bundle, tmp_path)
        with (path / "weights/model.safetensors").open("r+b") as file:
            file.truncate(100)
        assert code_of(Bundle.open, path) == "DSX-E406"

    def test_flipped_bit(self, v3_bundle: Bundle, tmp_path: Path):
        path = self.copy(v3_bundle, tmp_path)
        with (path / "weights/model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        assert code_of(Bundle.open(path).check_weights, Progress()) == "DSX-E406"


def test_links_reach_through_the_symbolic_links_of_a_download_cache(tmp_path: Path):
    """EXPORT-21：检查点目录里是指向别处的符号链接（Hugging Face 缓存），硬链接到真文件。"""
    blobs, snapshot, out = (tmp_path / name for name in ("blobs", "snapshot", "out"))
    write_checkpoint(blobs, TINY, shards=2)
    snapshot.mkdir()
    (out / "weights").mkdir(parents=True)
    (out / "weights/model.safetensors").write_bytes(b"half of a killed packed export")
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    linked = link_checkpoint(Checkpoint.open(snapshot).store, out)
    assert [Path(name).name for name in linked] == sorted(f.name for f in blobs.glob("*.safetensors"))
    assert not (out / "weights/model.safetensors").exists()
    for name in linked:
        assert not (out / name).is_symlink()
        assert (out / name).samefile(blobs / Path(name).name)
    assert TensorStore.open(out / "weights").fingerprint() == TensorStore.open(blobs).fingerprint()


class TestAtomicDirectory:
    """目标目录要么完整、要么不变。"""

    def test_failure_leaves_nothing(self, tmp_path: Path):
        def fail():
            with atomic_directory(tmp_path / "out", overwrite=False) as directory:
                (directory / "half").write_text("x")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_existing_is_refused(self, tmp_path: Path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/file").write_text("mine")

        def enter(overwrite: bool):
            with atomic_directory(tmp_path / "out", overwrite):
                pass

        assert code_of(enter, False) == "DSX-E401"
        assert code_of(enter, True) == "DSX-E401"  # 不是 bundle，--overwrite 也不碰
        assert (tmp_path / "out/file").read_text() == "mine"

    def test_overwrite_replaces_only_on_success(self, tmp_path: Path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "manifest.json").write_text("old")
        with pytest.raises(RuntimeError), atomic_directory(out, overwrite=True):
            raise RuntimeError
        assert (out / "manifest.json").read_text() == "old"
        with atomic_directory(out, overwrite=True) as directory:
            (directory / "manifest.json").write_text("new")
        assert (out / "manifest.json").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_stale_temporary_of_a_dead_process_is_removed(self, tmp_path: Path):
        """占住了输出位置，它的临时目录就都是死了的进程留下的，不论名字里是哪个进程号。"""
        for pid in (999999999, os.getppid()):
            (tmp_path / f".out.tmp-{pid}").mkdir()
        with atomic_directory(tmp_path / "out", overwrite=False):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("pid", [999999999, os.getpid()], ids=["another", "ours"])
    def test_half_written_weights_of_a_dead_process_are_handed_over(self, tmp_path: Path, pid: int):
        """EXPORT-24：被杀的导出写了一半的权重连同日志移进新的临时目录，进程号碰巧相同也一样；成功之后不留日志。"""
        dead = tmp_path / f".out.tmp-{pid}"
        (dead / "weights").mkdir(parents=True)
        (dead / "weights/model.safetensors").write_bytes(b"half")
        (dead / ".resume.json").write_text("{}")
        (dead / "model.onnx").write_text("stale")
        with atomic_directory(tmp_path / "out", overwrite=False) as directory:
            assert (directory / "weights/model.safetensors").read_bytes() == b"half"
            assert sorted(path.name for path in directory.iterdir()) == [".resume.json", "weights"]
            assert list(tmp_path.glob(".out.tmp-*")) == [directory]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["weights"]

    def test_leftover_of_an_interrupted_handover_is_only_removed(self, tmp_path: Path):
        """移交到一半又被杀：只剩日志的临时目录不再接着写，清掉而不报错。"""
        dead = tmp_path / ".out.tmp-999999999"
        dead.mkdir()
        (dead / ".resume.json").write_text("{}")
        check_free_space(tmp_path / "out", 1)
        with atomic_directory(tmp_path / "out", overwrite=False) as directory:
            assert list(tmp_path.glob(".out.tmp-*")) == [directory]
            assert list(directory.iterdir()) == []

    def test_killed_while_swapping_puts_the_old_one_back(self, tmp_path: Path):
        """EXPORT-9：恰在换上新内容时被杀，旧的放回原处，而不是与新的一起当垃圾清掉。"""
        old, new = tmp_path / ".out.tmp-999999999.old", tmp_path / ".out.tmp-999999999"
        for folder in (old, new):
            folder.mkdir()
            (folder / "manifest.json").write_text(folder.name)
        with output_lock(tmp_path / "out"):
            assert (tmp_path / "out/manifest.json").read_text() == old.name
        with atomic_directory(tmp_path / "out", overwrite=True) as directory:
            (directory / "manifest.json").write_text("newest")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out/manifest.json").read_text() == "newest"

    def test_space_of_half_written_weights_is_not_asked_for_twice(self, tmp_path: Path):
        """磁盘预检把能接着写的部分算在内。"""
        free = shutil.disk_usage(tmp_path).free
        needed = free + (1 << 40)
        assert code_of(check_free_space, tmp_path / "out", needed) == "DSX-E404"
        dead = tmp_path / ".out.tmp-999999999"
        (dead / "weights").mkdir(parents=True)
        (dead / ".resume.json").write_text("{}")
        with (dead / "weights/model.safetensors").open("wb") as file:
            file.truncate((1 << 40) + (1 << 32))
        check_free_space(tmp_path / "out", needed)

    def test_unwritable_parent(self, tmp_path: Path):
        (tmp_path / "file").write_text("not a directory")

        def enter():
            with atomic_directory(tmp_path / "file/out", overwrite=False):
                pass

        assert code_of(enter) == "DSX-E405"

    def test_what_is_not_a_product_of_ours_is_never_advised_to_be_overwritten(self, tmp_path: Path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/config.json").touch()
        (tmp_path / "file").touch()
        for out, said in ((tmp_path / "mine", "不是 dsx 的产物"), (tmp_path / "file", "不是目录")):
            for overwrite in (False, True):
                with pytest.raises(DsxError, match=said) as error:
                    check_output(out, overwrite)
                assert error.value.code == "DSX-E401"
                assert "--overwrite" not in error.value.todo
        assert "manifest.json" not in str(error.value)  # 不是目录的，不说里面没有什么
        (tmp_path / "mine/manifest.json").touch()
        with pytest.raises(DsxError, match="--overwrite"):
            check_output(tmp_path / "mine", False)
        check_output(tmp_path / "mine", True)

    def test_dots_in_the_middle_make_no_folder(self, tmp_path: Path):
        """``zz/../out`` 里的 zz 不必存在，也不留下；zz 是符号链接就照它指的走；没有 .. 的原样不动。"""
        with atomic_directory(tmp_path / "zz/../out", overwrite=False) as directory:
            (directory / "file").touch()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert code_of(check_output, output_path(tmp_path / "zz/.."), False) == "DSX-E401"
        (tmp_path / "far/inner").mkdir(parents=True)
        (tmp_path / "zz").symlink_to(tmp_path / "far/inner")
        assert output_path(tmp_path / "zz/../out") == tmp_path / "far/out"
        for plain in ("out", "../out", tmp_path / "zz/out"):
            assert output_path(plain) == Path(plain)


def test_disk_errors_name_the_file_and_no_option():
    """同一句话几个命令都会说：不提别的命令没有的选项；点名出错的那个文件。"""

    def call(action: Callable[[], object]) -> DsxError:
        with pytest.raises(DsxError) as error, disk_errors(Path("/somewhere/out")):
            action()
        assert "-o" not in error.value.todo
        return error.value

    assert "/dev/null" in call(lambda: Path("/dev/null").mkdir()).what
    assert "/somewhere/out" in call(lambda: os.write(-1, b"")).what


def test_full_disk_is_coded():
    """真的写满：/dev/full 对任何写入返回 ENOSPC。"""

    def write():
        with disk_errors(Path("/dev/full")), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    assert code_of(write) == "DSX-E404"


def test_free_space_is_checked_before_the_work(tmp_path: Path):
    assert code_of(check_free_space, tmp_path, 1 << 60) == "DSX-E404"
    check_free_space(tmp_path, 1)


class _AnonymousMemory(Progress):
    """记录进程匿名内存（不含文件映射）的最大值。"""

    peak = 0

    def advance(self, amount: int = 1, detail: str = "") -> None:
        self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """RssAnon，字节。"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path):
    """EXPORT-6：生成一个 1 GiB 的词嵌入，常驻内存（连同映射进来的文件页）只多出几块，远小于它。"""
    config = {**TINY, "vocab_size": 1 << 18, "hidden_size": 1024, "num_hidden_layers": 1}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, config, sparse=True))
    name = "model.embed_tokens.weight"
    recipe = weight_recipes(checkpoint.config, "float32")[name]
    before, peak, written = psutil.Process().memory_info().rss, 0, 0
    for chunk in materialize(name, recipe, checkpoint.store):
        written += chunk.nbytes
        peak = max(peak, psutil.Process().memory_info().rss)
    assert written == recipe.nbytes == 1 << 30
    assert peak - before < 6 * CHUNK_BYTES < recipe.nbytes / 2


def test_packed_export_memory_is_bounded_by_one_tensor(tmp_path: Path):
    """EXPORT-6：写权重的内存由最大的单个源张量决定，不随模型大小涨（叠放的专家逐个写）。"""
    config = {**DEMO_CONFIG, "n_routed_experts": 128, "moe_intermediate_size": 512, "vocab_size": 2048}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "ck", config, dtype="bfloat16"))
    recipes = weight_recipes(checkpoint.config, "float32")
    total = sum(recipe.nbytes for recipe in recipes.values())
    largest = max(spec_bytes(checkpoint, recipe) for recipe in recipes.values())
    assert total > 500e6
    gauge, before = _AnonymousMemory(), anonymous_memory()
    write_packed(tmp_path, recipes, checkpoint.store, gauge)
    assert gauge.peak - before < 8 * largest + 30e6


def spec_bytes(checkpoint: Checkpoint, recipe) -> int:
    """一个配方里最大的单个源张量，按 float32 计。"""
    return max((math.prod(checkpoint.store[name].shape) * 4 for name in recipe.sources), default=0)
