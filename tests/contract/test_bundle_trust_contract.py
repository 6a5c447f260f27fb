"""specs/export 里与信任有关的承诺：读到的是同一次导出的，内容与记下的相同，别人的东西不碰。"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deepseek_export
from deepseek_export.benchmark.bundle import Scenario, bench_bundle
from deepseek_export.bundle import Bundle, read_bundle
from deepseek_export.bundle.by_reference import UNHASHED
from deepseek_export.bundle.compared import COMPARED_FILE
from deepseek_export.bundle.disk import atomic_directory, output_lock, sha256_file
from deepseek_export.bundle.packed import WEIGHTS_FILE
from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.engine.build import build_engine
from deepseek_export.engine.derived import buildable_bundle
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.errors import DsxError
from deepseek_export.integration.causal_lm import DsxForCausalLM
from deepseek_export.progress import Progress
from tests.bundles import edit_model, edit_weight, find_node, set_float, tampered
from tests.integration.cli import TINY, assert_refused, dsx

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

IDS = list(range(3, 20))
#: 按引用的 bundle 里检查点的权重。
WEIGHTS = "weights/model.safetensors"
#: 一边被替换、一边加载这么多次。
LOADS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("trust") / "ckpt", TINY, dtype="float32", mtp=True)


@pytest.fixture(scope="module")
def first(checkpoint, tmp_path_factory) -> Bundle:
    """打包的 ``full``；只读。"""
    return deepseek_export.export(checkpoint, tmp_path_factory.mktemp("first") / "out", "full")


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> Bundle:
    """图与权重都不同、大小全相同的另一个模型：图配上另一个的权重，logits 与两者都不同。只读。"""
    scale = edit_model(lambda m: set_float(find_node(m, "MlaAttention", "layers.0"), "scale", 2.0))
    norm = edit_weight(first, "model.layers.0.input_layernorm.weight", lambda a: a * 3)

    def change(folder: Path) -> None:
        scale(folder)
        norm(folder)

    return tampered(first, tmp_path_factory.mktemp("second"), change)


@pytest.fixture
def referenced(checkpoint, tmp_path) -> Bundle:
    """按引用的 ``full``，检查点是自己的一份：可以改。"""
    own = shutil.copytree(checkpoint, tmp_path / "ckpt")
    return deepseek_export.export(own, tmp_path / "out", "full", weights="reference")


@pytest.fixture
def published(checkpoint, tmp_path) -> Bundle:
    """按引用的 ``full``，检查点在自己的一份缓存里，sha256 取自下载记录。"""
    return deepseek_export.export(
        in_cache(checkpoint, tmp_path), tmp_path / "out", "full", weights="reference"
    )


def refused(code: str, call: Callable, *arguments, **options) -> DsxError:
    with pytest.raises(DsxError) as error:
        call(*arguments, **options)
    assert error.value.code == code, error.value
    return error.value


def logits(session) -> np.ndarray:
    caches, positions = session.new_caches(1, len(IDS)), np.arange(len(IDS))[None]
    return session.run(np.array([IDS]), np.zeros(1, np.int64), positions, caches).copy()


def weights_of(bundle: Bundle) -> str:
    return bundle.manifest.files[WEIGHTS_FILE].sha256


def put(out: Path, bundle: Bundle) -> None:
    """像 ``dsx export --overwrite`` 那样把一个做好的 bundle 换到 ``out``。"""
    with atomic_directory(out, overwrite=True) as directory:
        shutil.copytree(bundle.path, directory, dirs_exist_ok=True)


def flip(file: Path, at: int) -> None:
    """就地改一个字节，大小不变。"""
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def change(file: Path) -> None:
    """改一个抽查不到的字节：最大的张量的四分之一处。"""
    store = TensorStore.of(file.parent, [file.name])
    spec = max((store[name] for name in store), key=lambda s: s.nbytes)
    flip(file, spec.offset + spec.nbytes // 4)


def in_cache(checkpoint: Path, folder: Path) -> Path:
    """Hugging Face 缓存里的快照：权重是指向 ``blobs/`` 的符号链接，名字是内容的 SHA-256。"""
    repository = folder / "models--x--y"
    snapshot = shutil.copytree(checkpoint, repository / "snapshots/main")
    weights = snapshot / "model.safetensors"
    blob = repository / "blobs" / sha256_file(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def in_folder(checkpoint: Path, folder: Path) -> Path:
    """下载到目录的检查点，带着权重的下载记录。"""
    copy = shutil.copytree(checkpoint, folder / "ckpt")
    record = copy / ".cache/huggingface/download/model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'0' * 40}\n{sha256_file(copy / 'model.safetensors')}\n{time.time()}\n")
    return copy


class Reading(Progress):
    """各个算哈希的阶段读了多少字节，说了什么。"""

    def __init__(self) -> None:
        self.hashed: Counter[str] = Counter()
        self.notes: list[str] = []
        self._stage: str | None = None

    def start(self, stage: str, total: int | None = None, unit: str = "items") -> None:
        self._stage = stage if "sha256" in stage else None

    def advance(self, amount: int = 1, detail: str = "") -> None:
        if self._stage is not None:
            self.hashed[self._stage] += amount

    def note(self, line: str) -> None:
        self.notes.append(line)


def replaced_by(out: Path, bundle: Bundle) -> Progress:
    """进度一开始就把 ``out`` 换掉，只换一次。"""

    class Replacing(Progress):
        done = False

        def start(self, *_: object, **__: object) -> None:
            if not self.done:
                self.done = True
                put(out, bundle)

    return Replacing()


class TestReplacedWhileRead:
    """EXPORT-10。"""

    def test_a_load_caught_in_the_middle_starts_over(self, first, second, tmp_path):
        """EXPORT-10：manifest 是旧的、其余会是新的：从头再读，得到的整个是新的。"""
        out = tmp_path / "out"
        put(out, first)
        progress = replaced_by(out, second)
        model = deepseek_export.load(out, threads=1, verify_weights=True, progress=progress)
        assert model.manifest == second.manifest
        assert np.array_equal(
            logits(model.session), logits(deepseek_export.load(second.path, threads=1).session)
        )

    def test_a_read_that_never_ends_in_peace_is_refused(self, first, second, tmp_path):
        """EXPORT-10：次次被换掉，有限次之后按码拒绝；读的时候出的别的错也由此而来。"""
        out, seen = tmp_path / "out", []
        put(out, first)

        def read(bundle: Bundle) -> None:
            seen.append(bundle)
            put(out, second)
            if len(seen) % 2:
                raise FileNotFoundError

        refused("DSX-E412", read_bundle, out, read)
        assert 1 < len(seen) < 10

    def test_no_verdict_about_a_mixture(self, first, second, tmp_path):
        """EXPORT-10：verify、compare、bench 读到一半被换掉：不下结论，不把报告写进新的里。"""
        calls = {
            "verify": lambda out, progress: deepseek_export.verify(out, levels=["op"], progress=progress),
            "compare": lambda out, progress: deepseek_export.compare(
                out, blocks=["embed"], progress=progress
            ),
            "bench": lambda out, progress: bench_bundle(
                out,
                scenario=Scenario(prompt_len=4, new_tokens=2, depths=(16,), runs=1),
                verify_weights=True,
                progress=progress,
            ),
        }
        for name, call in calls.items():
            out = tmp_path / name
            put(out, first)
            refused("DSX-E412", call, out, replaced_by(out, second))
            assert Bundle.open(out).manifest == second.manifest
            assert {path.name for path in (out / "reports").iterdir()} == {"export.json"}

    def test_no_engine_of_a_mixture(self, checkpoint, tmp_path):
        """EXPORT-10：建引擎的时候被换掉：不建，新的里没有旧的引擎。"""
        made = deepseek_export.export(
            checkpoint, tmp_path / "made", "mla", target="tensorrt-rtx", dtype="float16"
        )
        out = tmp_path / "out"
        put(out, made)
        shapes = ProfileShapes.parse("T=128", TINY["max_position_embeddings"])
        progress = replaced_by(out, made)
        refused("DSX-E412", build_engine, Bundle.open(out), 89, FLAVOURS["rtx"], shapes, progress)
        assert not (out / "engines").exists()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="要 fork 一个写者")
    def test_reader_and_writer_at_the_same_time(self, first, second, tmp_path):
        """EXPORT-10：一个进程不停地互相替换两个模型，另一个不停地加载：每次的图、权重、manifest、草稿都是同一个模型的。"""
        out = tmp_path / "out"
        put(out, first)
        models = [deepseek_export.load(bundle.path, threads=1) for bundle in (first, second)]
        began = time.perf_counter()
        deepseek_export.load(out, threads=1)
        pause = 4 * (time.perf_counter() - began)  # 一次加载里有时换几次，有时一次也不换
        want = {weights_of(model.bundle): logits(model.session) for model in models}
        parent, child = os.getpid(), os.fork()
        if child == 0:
            choose = random.Random(0)
            while os.getppid() == parent:
                put(out, choose.choice((first, second)))
                time.sleep(choose.uniform(0, pause))
            os._exit(0)
        seen: Counter[str] = Counter()
        try:
            for number in range(LOADS):
                load = (deepseek_export.load, DsxForCausalLM.from_pretrained)[number % 2]
                try:
                    model = load(out, threads=1)
                except DsxError as error:
                    if error.code != "DSX-E412":
                        raise
                    seen[error.code] += 1
                    continue
                assert np.array_equal(logits(model.session), want[weights_of(model.bundle)])
                seen[weights_of(model.bundle)] += 1
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert want.keys() <= seen.keys(), seen


class TestOneWriter:
    """EXPORT-11。"""

    def test_second_exporter_is_refused_at_once(self, tmp_path):
        """EXPORT-11：有人在写，另一个连检查点都不看就拒绝，写明是谁；pack 也一样。"""
        out, seen = tmp_path / "out", []

        def others() -> None:
            seen.append(refused("DSX-E411", deepseek_export.export, tmp_path / "no checkpoint", out))
            seen.append(refused("DSX-E411", deepseek_export.pack, out))

        with output_lock(out):
            thread = threading.Thread(target=others)
            thread.start()
            thread.join()
        assert [f"进程 {os.getpid()} " in error.what for error in seen] == [True, True]
        assert list(tmp_path.iterdir()) == []

    def test_threads_exporting_to_one_place(self, checkpoint, tmp_path):
        """EXPORT-11：一个进程的几个线程同时导出到同一处：恰有一个成功，得到的加载得了。"""
        out, done = tmp_path / "out", []
        barrier = threading.Barrier(3)

        def export() -> None:
            barrier.wait()
            try:
                done.append(deepseek_export.export(checkpoint, out, "full"))
            except DsxError as error:
                done.append(error.code)

        threads = [threading.Thread(target=export) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = [each for each in done if isinstance(each, str)]
        assert len(codes) == 2
        assert set(codes) <= {"DSX-E411", "DSX-E401"}
        assert np.isfinite(logits(deepseek_export.load(out, threads=1).session)).all()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_bundle_finished_in_the_meantime_is_kept(self, checkpoint, first, tmp_path):
        """EXPORT-11：开工时 OUT 不在、导出途中别人写好了一个：没有 --overwrite 就不替换它。"""
        out = tmp_path / "out"

        class Meanwhile(Progress):
            def start(self, stage: str, *_: object, **__: object) -> None:
                if stage == "写权重":
                    shutil.copytree(first.path, out)

        refused("DSX-E401", deepseek_export.export, checkpoint, out, "full", progress=Meanwhile())
        assert Bundle.open(out).manifest == first.manifest
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestHashes:
    """EXPORT-12。"""

    @pytest.mark.parametrize("name", ["model.onnx", "mtp.onnx", "config.json"])
    def test_an_edited_file_is_never_opened(self, first, tmp_path, name):
        """EXPORT-12：图、配置改了一个字节、大小不变：一打开就拒绝。"""
        out = shutil.copytree(first.path, tmp_path / "out")
        flip(out / name, (out / name).stat().st_size // 2)
        for call in (
            Bundle.open,
            deepseek_export.load,
            DsxForCausalLM.from_pretrained,
            deepseek_export.verify,
        ):
            assert name in refused("DSX-E406", call, out).what

    def test_scale_of_the_model_is_never_changed_silently(self, first, second, tmp_path):
        """EXPORT-12：图里的 scale 改成另一个数，仍是合法的 ONNX：一打开就拒绝。"""
        out = shutil.copytree(first.path, tmp_path / "out")
        shutil.copyfile(second.path / "model.onnx", out / "model.onnx")
        refused("DSX-E406", deepseek_export.load, out)

    def test_packed_weights_by_policy(self, first, tmp_path):
        """EXPORT-12：打包的权重翻一个字节：verify、compare 总会发现；generate、bench 要了才读。"""
        out = shutil.copytree(first.path, tmp_path / "out")
        flip(out / WEIGHTS_FILE, (out / WEIGHTS_FILE).stat().st_size - 2)
        deepseek_export.load(out)
        for call in (deepseek_export.verify, deepseek_export.compare):
            assert WEIGHTS_FILE in refused("DSX-E406", call, out).what
        for call in (deepseek_export.load, bench_bundle, DsxForCausalLM.from_pretrained):
            refused("DSX-E406", call, out, verify_weights=True)
        assert_refused(dsx("generate", out, "--ids", "1", "--verify-weights"), "DSX-E406")
        assert dsx("generate", out, "--ids", "1", "--max-new-tokens", "1").returncode == 0

    def test_one_byte_of_a_referenced_checkpoint(self, referenced):
        """EXPORT-12：检查点翻一个抽查不到的字节：要读全部权重的都会发现，generate 要了才读。"""
        out, name = referenced.path, "weights/model.safetensors"
        assert referenced.manifest.files[name].bytes == (out / name).stat().st_size
        spec = max(
            (
                TensorStore.open(out / "weights")[n]
                for n in referenced.manifest.weights.recipes
                if n in TensorStore.open(out / "weights")
            ),
            key=lambda s: s.nbytes,
        )
        flip(referenced.path.parent / "ckpt/model.safetensors", spec.offset + spec.nbytes // 4)
        deepseek_export.load(out)
        for call in (deepseek_export.verify, deepseek_export.compare, deepseek_export.pack):
            assert name in refused("DSX-E408", call, out).what
        refused("DSX-E408", buildable_bundle, Bundle.open(out), FLAVOURS["rtx"])
        refused("DSX-E408", deepseek_export.load, out, verify_weights=True)
        assert_refused(dsx("pack", out), "DSX-E408")
        assert Bundle.open(out).manifest == referenced.manifest

    def test_without_hashes_nothing_is_claimed(self, checkpoint, tmp_path):
        """EXPORT-12：--no-hash-weights 导出的证明不了权重：说明白、记进 manifest，要证明的拒绝，除非明说不证明；打包之后就有了。"""
        out = tmp_path / "out"
        process = dsx(
            "export", checkpoint, "-p", "full", "-o", out, "--weights", "reference", "--no-hash-weights"
        )
        assert process.returncode == 0, process.stderr
        assert UNHASHED in process.stderr
        bundle = Bundle.open(out)
        assert UNHASHED in bundle.manifest.fallbacks
        assert not {*bundle.manifest.weights.files} & bundle.manifest.files.keys()
        for call in (deepseek_export.verify, deepseek_export.compare, deepseek_export.pack):
            assert "--no-verify-weights" in refused("DSX-E413", call, out).todo
        refused("DSX-E413", buildable_bundle, bundle, FLAVOURS["rtx"])
        assert deepseek_export.verify(out, levels=["op"], verify_weights=False).first_failure is None
        assert dsx("pack", out, "--no-verify-weights").returncode == 0
        packed = Bundle.open(out)
        packed.check_weights(Progress())
        assert UNHASHED not in packed.manifest.fallbacks


class TestPublishedHashes:
    """EXPORT-14。"""

    @pytest.mark.parametrize("layout", ["cache", "folder"])
    def test_the_export_takes_what_the_download_recorded(self, checkpoint, tmp_path, layout):
        """EXPORT-14：缓存与目录里的下载记录都直接取用，写明出处；检查点一个字节也没有为它读，别的文件照读。"""
        source = in_cache(checkpoint, tmp_path) if layout == "cache" else in_folder(checkpoint, tmp_path)
        reading = Reading()
        bundle = deepseek_export.export(
            source, tmp_path / "out", "full", weights="reference", progress=reading
        )
        entry = bundle.manifest.files[WEIGHTS]
        assert (entry.sha256, entry.sha256_from) == (sha256_file(bundle.path / WEIGHTS), "hub")
        assert {e.sha256_from for name, e in bundle.manifest.files.items() if name != WEIGHTS} == {"read"}
        assert entry.bytes > sum(reading.hashed.values())
        assert any("下载记录" in line for line in reading.notes)
        assert deepseek_export.inspect(bundle.path)["weights"]["sha256_from"] == {"hub": 1}
        assert "1 个文件取自 Hugging Face 的下载记录" in dsx("inspect", bundle.path).stdout
        assert deepseek_export.verify(bundle.path, levels=["op"]).first_failure is None

    def test_a_record_that_no_longer_holds_is_not_used(self, checkpoint, tmp_path):
        """EXPORT-14：记录之后改过的文件读一遍，记下的是现在的内容。"""
        source = in_folder(checkpoint, tmp_path)
        change(source / "model.safetensors")
        os.utime(source / "model.safetensors", (time.time() + 60,) * 2)
        bundle = deepseek_export.export(source, tmp_path / "out", "full", weights="reference")
        assert bundle.manifest.files[WEIGHTS].sha256_from == "read"
        assert deepseek_export.inspect(bundle.path)["weights"]["sha256_from"] == {"read": 1}
        bundle.check_weights(Progress())

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_one_byte_is_refused_by_whatever_reads_it_first(self, checkpoint, tmp_path, when):
        """EXPORT-14：导出之前或之后坏了一个抽查不到的字节：verify、compare、pack、build 与第一次加载都拒绝，不管是不是要求核对。"""
        source, out = in_cache(checkpoint, tmp_path), tmp_path / "out"
        if when == "before":
            change(source / "model.safetensors")
        bundle = deepseek_export.export(source, out, "full", weights="reference")
        if when == "after":
            change(source / "model.safetensors")
        for call in (
            deepseek_export.verify,
            deepseek_export.compare,
            deepseek_export.pack,
            deepseek_export.load,
            DsxForCausalLM.from_pretrained,
            bench_bundle,
        ):
            assert WEIGHTS in refused("DSX-E408", call, out).what
        assert "重新下载" in refused("DSX-E408", deepseek_export.load, out).todo
        refused("DSX-E408", buildable_bundle, bundle, FLAVOURS["rtx"])
        assert_refused(dsx("generate", out, "--ids", "1"), "DSX-E408")
        assert_refused(dsx("pack", out), "DSX-E408")
        assert dsx("generate", out, "--ids", "1", "--no-verify-weights").returncode == 0
        assert not (out / COMPARED_FILE).exists()

    def test_what_was_compared_is_not_read_again(self, published):
        """EXPORT-14：核对过的记下来，下一次加载不读；改过的、拷到别处的再读。"""
        reading = Reading()
        for _ in range(2):
            deepseek_export.load(published.path, progress=reading)
        size = published.manifest.files[WEIGHTS].bytes
        assert reading.hashed == {"核对权重的 sha256": size}
        again = Reading()
        deepseek_export.load(
            shutil.copytree(published.path, published.path.with_name("copy")), progress=again
        )
        assert again.hashed == {"核对权重的 sha256": size}
        change(published.path / WEIGHTS)
        refused("DSX-E408", deepseek_export.load, published.path)

    def test_verify_always_reads(self, published):
        """EXPORT-14：记下核对过的只省去加载时的：改了又把 mtime 放回去的，verify、pack 与 --verify-weights 照样发现。"""
        deepseek_export.load(published.path)
        before = (published.path / WEIGHTS).stat()
        change(published.path / WEIGHTS)
        os.utime(published.path / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
        for call in (deepseek_export.verify, deepseek_export.pack):
            refused("DSX-E408", call, published.path)
        refused("DSX-E408", deepseek_export.load, published.path, verify_weights=True)

    @pytest.mark.parametrize("record", ["", "[]", '{"files": {"weights/model.safetensors": {}}}'])
    def test_a_broken_note_counts_for_nothing(self, published, record):
        """EXPORT-14：记录坏了，等于没有核对过。"""
        deepseek_export.load(published.path)
        (published.path / COMPARED_FILE).write_text(record)
        reading = Reading()
        deepseek_export.load(published.path, progress=reading)
        assert reading.hashed

    def test_a_bundle_that_cannot_keep_the_note_still_loads(self, published):
        """EXPORT-14：记不下来就说一声，下一次再读。"""
        shutil.rmtree(published.path / "reports")
        (published.path / "reports").write_text("")
        reading = Reading()
        for _ in range(2):
            deepseek_export.load(published.path, progress=reading)
        assert sum("记不下来" in line for line in reading.notes) == 2
        assert reading.hashed["核对权重的 sha256"] == 2 * published.manifest.files[WEIGHTS].bytes

    def test_packing_leaves_the_note_behind(self, published, first):
        """EXPORT-14：打包之后的权重是自己写的，从前的记录不带过去。"""
        deepseek_export.load(published.path)
        packed = deepseek_export.pack(published.path)
        assert not (packed.path / COMPARED_FILE).exists()
        assert packed.manifest.files == first.manifest.files

    def test_stages_are_compared_too(self, published, tmp_path):
        """EXPORT-14：切成一套 stage，出处跟着走；加载之前同样核对。"""
        stages = deepseek_export.split(published.path, tmp_path / "stages", 2)
        assert deepseek_export.inspect(stages.path)["weights"]["sha256_from"] == {"hub": 1}
        reading = Reading()
        for _ in range(2):
            stages.confirm_weights(None, reading)
        assert reading.hashed["核对权重的 sha256"] == 2 * published.manifest.files[WEIGHTS].bytes
        change(published.path / WEIGHTS)
        refused("DSX-E408", deepseek_export.load, stages.path)

    def test_a_manifest_without_the_field_was_read(self, referenced):
        """EXPORT-14：从前导出的没有写出处，都是读了算的：照样打开，加载不读。"""
        file = referenced.path / "manifest.json"
        manifest = json.loads(file.read_text(encoding="utf-8"))
        for entry in manifest["files"].values():
            assert entry.pop("sha256_from") == "read"
        file.write_text(json.dumps(manifest), encoding="utf-8")
        reading = Reading()
        deepseek_export.load(referenced.path, progress=reading)
        assert not reading.hashed
        assert Bundle.open(referenced.path).manifest == referenced.manifest


class TestForeignFiles:
    """EXPORT-13。"""

    def test_overwrite_never_deletes_what_dsx_did_not_write(self, checkpoint, first, tmp_path):
        """EXPORT-13：旧 bundle 里有自己放的文件：开工之前拒绝、点名，一个也不删；移走之后照常，引擎与报告归 dsx。"""
        out = shutil.copytree(first.path, tmp_path / "out")
        for name in ("notes.txt", "weights/lora.safetensors", "deep/er/file", "engines/mine", "reports/mine"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("mine")
        what = refused("DSX-E401", deepseek_export.export, checkpoint, out, "full", overwrite=True).what
        for name in ("notes.txt", "weights/lora.safetensors", "deep/er/file"):
            assert name in what
            assert (out / name).read_text() == "mine"
            (out / name).unlink()
        assert "engines" not in what
        assert "reports" not in what
        deepseek_export.export(checkpoint, out, "full", overwrite=True)
        assert not (out / "engines").exists()

    def test_files_put_there_during_the_export(self, checkpoint, first, tmp_path):
        """EXPORT-13：导出途中放进去的也不删。"""
        out = shutil.copytree(first.path, tmp_path / "out")

        class Meanwhile(Progress):
            def start(self, *_: object, **__: object) -> None:
                (out / "notes.txt").write_text("mine")

        arguments = {"overwrite": True, "progress": Meanwhile()}
        refused("DSX-E401", deepseek_export.export, checkpoint, out, "full", **arguments)
        assert (out / "notes.txt").read_text() == "mine"
        assert Bundle.open(out).manifest == first.manifest

    def test_pack_refuses_them_too(self, referenced):
        """EXPORT-13：打包也是整个换掉。"""
        (referenced.path / "weights/notes.txt").write_text("mine")
        assert "weights/notes.txt" in refused("DSX-E401", deepseek_export.pack, referenced.path).what

    def test_a_link_is_refused_by_every_writer(self, first, referenced, tmp_path):
        """EXPORT-13：输出位置是符号链接：export、pack 都不做，什么也没有换。"""
        link = tmp_path / "link"
        link.symlink_to(referenced.path)
        for call in (
            lambda: deepseek_export.export(tmp_path / "ckpt", link, "full", overwrite=True),
            lambda: deepseek_export.pack(link),
        ):
            assert str(referenced.path) in refused("DSX-E401", call).what
        assert link.is_symlink()
        assert Bundle.open(link).manifest == referenced.manifest
