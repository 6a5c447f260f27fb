"""specs/cluster 的承诺：切分，以及切开之后与一个进程逐位相同。"""

from __future__ import annotations

import gc
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import deepseek_export
from deepseek_export.backend import backend_named
from deepseek_export.benchmark.bundle import Scenario, bench_bundle
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.stages import StageSet
from deepseek_export.cluster.backend import PipelineBackend
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.errors import DsxError
from deepseek_export.plan.balance import balanced
from deepseek_export.progress import Progress
from deepseek_export.runtime import SamplingParams
from deepseek_export.serving import Engine, EngineSettings
from tests.bundles import edit_weight, tampered
from tests.contract.test_runtime_only_contract import without_compilers
from tests.engines import refused
from tests.serving_plans import Ask, assert_same_as_alone
from tests.stages import KINDS, alive, children, loaded, write_five

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

#: 长短不一的一批。
RAGGED = [[5, 9, 23, 100, 7, 31, 8, 44, 2], [12, 3], [90, 1, 77, 6]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """名字 → 五层的 bundle，各导出一次。"""
    folder = tmp_path_factory.mktemp("cluster")
    checkpoint = write_five(folder / "ck")

    def build(kind: str) -> Path:
        if not (folder / kind).exists():
            deepseek_export.export(checkpoint, folder / kind, **KINDS[kind])  # type: ignore[arg-type]
        return folder / kind

    return build


@pytest.fixture(scope="module")
def split(bundles: Callable[[str], Path]) -> Callable[[str, int | str], Path]:
    """名字与切法 → 一套 stage，各切一次。"""

    def build(kind: str, stages: int | str) -> Path:
        out = bundles(kind).with_name(f"{kind}-{stages}")
        if not out.exists():
            deepseek_export.split(bundles(kind), out, stages)
        return out

    return build


def test_a_stage_has_only_its_own(bundles, split):
    """CLUSTER-1：权重恰好分完，共有的只有词嵌入，是同一份；中间的 stage 不要 token；原来的 bundle 不变。"""
    before = {path: path.stat().st_mtime_ns for path in bundles("float32").rglob("*")}
    stages = StageSet.open(split("float32", 3))
    stages.check_weights(Progress())
    opened = [Bundle.open(directory) for directory in stages.directories]
    names = [set(one.manifest.weights.recipes) for one in opened]
    whole = set(Bundle.open(bundles("float32")).manifest.weights.recipes)
    assert set().union(*names) == whole
    assert names[0] & names[2] == {"model.embed_tokens.weight"}
    assert not names[1] & (names[0] | names[2])
    for one, own in zip(opened, names, strict=True):
        held: set[str] = set()
        for file in one.manifest.weights.files:
            with safe_open(str(one.path / file), "np") as weights:
                held |= set(weights.keys())
        assert held == own
    first, last = (one.path / "weights/shared.safetensors" for one in (opened[0], opened[2]))
    assert first.samefile(last)
    ports = [{port.name for port in one.manifest.main.inputs} for one in opened]
    assert ports[1] == {"hidden_in", "past_lens", "kv_cache.2", "kv_cache.3"}
    assert "hidden_in" not in ports[0]
    assert "input_ids" not in ports[2]
    assert [[graph.role for graph in one.manifest.graphs] for one in opened] == [
        ["main"],
        ["main"],
        ["main", "draft"],
    ]
    assert {path: path.stat().st_mtime_ns for path in bundles("float32").rglob("*")} == before


def test_a_stage_by_reference_links_only_the_files_it_reads(tmp_path, bundles):
    """CLUSTER-1：检查点分成几个文件时，每个 stage 只链接用得到的，链接不占地方。"""
    checkpoint = tmp_path / "ck"
    shutil.copytree(bundles("float32").parent / "ck", checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for layer in range(6):
        part = {name: array for name, array in tensors.items() if f".layers.{layer}." in name}
        if layer == 0:
            part |= {name: array for name, array in tensors.items() if ".layers." not in name}
        save_file(part, checkpoint / f"part-{layer}.safetensors")
        index |= dict.fromkeys(part, f"part-{layer}.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    out = deepseek_export.export(checkpoint, tmp_path / "out", "full", weights="reference").path
    stages = deepseek_export.split(out, tmp_path / "stages", "0-1,2-3,4")
    linked = [
        sorted(path.name for path in (directory / "weights").glob("*.safetensors"))
        for directory in stages.directories
    ]
    assert linked == [
        ["part-0.safetensors", "part-1.safetensors"],
        ["part-2.safetensors", "part-3.safetensors"],
        ["part-0.safetensors", "part-4.safetensors", "part-5.safetensors"],
    ]
    assert (stages.directories[1] / "weights/part-2.safetensors").samefile(checkpoint / "part-2.safetensors")
    want = deepseek_export.load(out, 1).generate(RAGGED, 6, ignore_eos=True).token_ids
    with loaded(stages.path) as model:
        assert model.generate(RAGGED, 6, ignore_eos=True).token_ids == want


def test_where_it_is_cut(bundles, tmp_path):
    """CLUSTER-2：按字节均匀；照写的切；编号写在每个节点上；切不了的说为什么。"""
    made = deepseek_export.split(bundles("float32"), tmp_path / "even", 2)
    sizes = [item.weight_bytes for item in made.record.stages]
    for cut in range(1, 5):
        other = deepseek_export.split(bundles("float32"), tmp_path / f"cut-{cut}", f"0-{cut - 1},{cut}-4")
        assert max(sizes) <= max(item.weight_bytes for item in other.record.stages)
    made = deepseek_export.split(bundles("float32"), tmp_path / "asked", "0,1-3,4")
    assert [item.layers for item in made.record.stages] == [[0], [1, 2, 3], [4]]
    for number, directory in enumerate(made.directories):
        model = onnx.load(directory / "model.onnx", load_external_data=False)
        marks = {
            (one.configuration_id, one.pipeline_stage)
            for node in model.graph.node
            for one in node.device_configurations
        }
        assert marks == {(model.configuration[0].name, number)}
        assert model.configuration[0].num_devices == 3
    for asked in (0, 6, "0-1", "0-1,3-4", "1-4", "0-4,5", "a-b", "0-1,1-4", "2-0,1-4", ""):
        with pytest.raises(DsxError, match="DSX-E740"):
            deepseek_export.split(bundles("float32"), tmp_path / "no", asked)
    with pytest.raises(DsxError, match="DSX-E748"):
        deepseek_export.split(made.directories[0], tmp_path / "no", 1)
    assert not (tmp_path / "no").exists()


def stage_loads(sizes: list[int], first: int, last: int, cuts: list[tuple[int, int]]) -> list[int]:
    """每段有多大。"""
    found = [sum(sizes[begin:end]) for begin, end in cuts]
    found[0] += first
    found[-1] += last
    return found


def test_stages_are_as_even_as_they_can_be():
    """CLUSTER-2：最大的一段尽量小，其次尽量一样大；与逐个试过的最好的一样。"""
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = int(rng.integers(1, 9))
        sizes, first, last = rng.integers(1, 50, count).tolist(), *rng.integers(0, 80, 2).tolist()
        stages = int(rng.integers(1, count + 1))

        tried = []
        for inner in itertools.combinations(range(1, count), stages - 1):
            edges = [0, *inner, count]
            tried.append(stage_loads(sizes, first, last, list(itertools.pairwise(edges))))
        got = stage_loads(sizes, first, last, balanced(sizes, first, last, stages))
        assert (max(got), sum(x * x for x in got)) == min(
            (max(one), sum(x * x for x in one)) for one in tried
        )


def read_per_token(directory: Path) -> float:
    """解码一个 token 要读这个 stage 的多少字节：专家只读选中的，词嵌入只查几行，草稿模块（第 5 层）不算。"""
    manifest = Bundle.open(directory).manifest
    share = manifest.model.num_experts_per_tok / manifest.model.n_routed_experts
    return sum(
        recipe.nbytes * (share if ".mlp.experts." in name else 1)
        for name, recipe in manifest.weights.recipes.items()
        if name != "model.embed_tokens.weight" and ".layers.5." not in name
    )


def test_balanced_by_time(bundles, tmp_path):
    """CLUSTER-2：--balance time 让一个 token 读得最多的 stage 尽量少读，比哪一种切法都不多。"""
    made = deepseek_export.split(bundles("float32"), tmp_path / "time", 2, balance="time")
    slowest = max(map(read_per_token, made.directories))
    for cut in range(1, 5):
        asked = f"0-{cut - 1},{cut}-4"
        other = deepseek_export.split(bundles("float32"), tmp_path / f"cut-{cut}", asked)
        assert slowest <= max(map(read_per_token, other.directories)) * (1 + 1e-9)


def test_a_graph_with_more_crossing_is_refused(bundles, tmp_path):
    """CLUSTER-2：后面的层还要 token 的图切不开，说是什么要过。"""

    def reach_back(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == "past_lens" and node.name.startswith("layers.3"):
                    node.input[place] = "input_ids"
        onnx.save(model, folder / "model.onnx")

    bad = tampered(Bundle.open(bundles("float32")), tmp_path, reach_back)
    error = refused("DSX-E746", lambda: deepseek_export.split(bad.path, tmp_path / "out", 2))
    assert "input_ids" in error.what


def test_all_or_nothing(bundles, split, tmp_path):
    """CLUSTER-3：缺的、改过的、混进另一套的都在加载之前拒绝；``--overwrite`` 不删别人的文件。"""
    whole = tmp_path / "stages"
    shutil.copytree(split("float32", 3), whole)
    shutil.copytree(split("float32", 2), tmp_path / "two")

    def broken(change: Callable[[Path], object]) -> str:
        folder = tmp_path / "broken"
        shutil.copytree(whole, folder)
        change(folder)
        try:
            return refused("DSX-E741", lambda: deepseek_export.load(folder)).what
        finally:
            shutil.rmtree(folder)

    assert "stage.1" in broken(lambda folder: shutil.rmtree(folder / "stage.1"))
    assert "config.json" in broken(lambda folder: (folder / "config.json").write_text("{}"))
    mixed = broken(
        lambda folder: shutil.copyfile(
            tmp_path / "two/stage.1/manifest.json", folder / "stage.1/manifest.json"
        )
    )
    assert "另一次切分" in mixed
    assert "stages.json" in broken(lambda folder: (folder / "stages.json").write_text("{"))
    assert "stages.json" in broken(
        lambda folder: (folder / "stages.json").write_text('{"schema_version": 2}')
    )
    refused("DSX-E741", lambda: StageSet.open(bundles("float32")))
    refused("DSX-E401", lambda: deepseek_export.split(bundles("float32"), whole, 2))
    (whole / "stage.0/notes.txt").write_text("mine")
    error = refused("DSX-E401", lambda: deepseek_export.split(bundles("float32"), whole, 2, overwrite=True))
    assert "stage.0/notes.txt" in error.what
    (whole / "stage.0/notes.txt").unlink()
    assert len(deepseek_export.split(bundles("float32"), whole, 2, overwrite=True).directories) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_bit_equal_to_one_process(bundles, split, kind):
    """CLUSTER-4：1 到 4 个 stage，logits 与 token 逐位相同，长度不等的一批，普通的与投机的。"""
    alone = deepseek_export.load(bundles(kind), 1, speculative_floor=False)
    logits = alone.generator.logits(RAGGED)
    ways = (False,) if alone.speculative is None else (False, True)
    want = {way: alone.generate(RAGGED, 24, speculative=way, ignore_eos=True).token_ids for way in ways}
    for stages in (1, 2, 3, 4):
        with loaded(split(kind, stages), speculative_floor=False) as model:
            for got, expected in zip(model.generator.logits(RAGGED), logits, strict=True):
                assert np.array_equal(got, expected)
            for way in ways:
                assert model.generate(RAGGED, 24, speculative=way, ignore_eos=True).token_ids == want[way]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_served_together_equals_alone(bundles, split, kind):
    """CLUSTER-4：服务引擎在一套 stage 上，前缀复用、行的对调、取消之后，与一个进程上的引擎逐个 token 相同。"""
    shared = RAGGED[0] * 3
    asks = [
        [*shared, 1, 2],
        [*shared, 9],
        RAGGED[1],
        [*shared, 1, 2, 50, 51],
        RAGGED[2] * 4,
        [*shared[:20], 7],
    ]

    def served(path: Path) -> tuple[list[list[int]], int]:
        with loaded(path) as model, model.engine(EngineSettings(slots=2, rows=4, prefill_tokens=8)) as engine:
            hot = SamplingParams(temperature=0.8, seed=3)
            found = []
            for first in range(0, len(asks), 2):
                pair = [
                    engine.submit(ids, hot if number else None, max_new_tokens=8 + number, ignore_eos=True)
                    for number, ids in enumerate(asks[first : first + 2])
                ]
                found += [request.result().token_ids for request in pair]
            return found, engine.stats.hit_tokens

    want, hits = served(bundles(kind))
    got, found_hits = served(split(kind, 3))
    assert got == want
    assert found_hits == hits > 0


def test_the_engine_contract_holds_over_stages(split):
    """CLUSTER-4、SERVE-1：与别人同时跑、到达与取消不一，每个请求与生成器单独跑的相同。"""
    asks = [
        Ask(ids * 2, 9, SamplingParams(), arrives=3 * number, ignore_eos=True)
        for number, ids in enumerate(RAGGED)
    ]
    with loaded(split("float32", 2)) as model:
        assert_same_as_alone(model.session, (), asks, EngineSettings(slots=2, rows=3, prefill_tokens=4))
        assert isinstance(model.engine(), Engine)


def test_processes_come_and_go(split):
    """CLUSTER-5：加载起进程，关掉、没有人用了都停；没有留下进程。"""
    before = set(children())
    model = deepseek_export.load(split("float32", 3), 1)
    mine = set(children()) - before
    assert len(mine) == 3
    model.close()
    assert alive([*mine]) == []
    refused("DSX-E522", lambda: model.generate([[1, 2]], 2))
    forgotten = deepseek_export.load(split("float32", 2), 1)
    mine = set(children()) - before
    del forgotten
    gc.collect()
    assert alive([*mine]) == []


def test_one_stage_alone_cannot_generate(split, bundles):
    """CLUSTER-5：单独一个 stage、拿整套 stage 当 bundle，都说清楚；打不开的 stage 报它自己的码。"""
    stages = split("float32", 3)
    for directory in StageSet.open(stages).directories:
        refused("DSX-E748", lambda directory=directory: deepseek_export.load(directory))
    refused("DSX-E748", lambda: Bundle.open(stages))


def test_a_stage_that_cannot_open_says_why(split, tmp_path):
    """CLUSTER-5：stage 的文件坏了，加载失败，错误码是它自己的，没有留下进程。"""
    broken = tmp_path / "stages"
    shutil.copytree(split("float32", 3), broken)
    with (broken / "stage.1/model.onnx").open("ab") as file:
        file.write(b"!")
    before = set(children())
    error = refused("DSX-E406", lambda: deepseek_export.load(broken))
    assert "stage 1" in error.what
    assert set(children()) <= before


def test_running_stages_needs_no_compiler(split, bundles):
    """CLUSTER-5：没有 torch 与 onnx 也加载、生成。"""
    want = deepseek_export.load(bundles("float32"), 1).generate(RAGGED, 6).token_ids
    script = f"""
import deepseek_export as dsx
if __name__ == "__main__":
    model = dsx.load(sys.argv[1], 1)
    print(model.generate({RAGGED}, 6).token_ids)
    model.close()
"""
    assert without_compilers(script, str(split("float32", 2))).splitlines() == [str(want)]


@pytest.mark.parametrize("kind", ["float32", "int8", "baseline"])
def test_verified_as_one_and_each_alone(split, kind):
    """CLUSTER-11：连起来的与每个单独的都通过；没有截的写明；没有留下进程。"""
    before = set(children())
    path = split(kind, 3)
    report = deepseek_export.verify(path, steps=6)
    assert report.passed, report.first_failure
    named = [case.name for case in report.cases if case.name.startswith("stage.")]
    assert named == ["stage.0 hidden_out", "stage.1 hidden_out", "stage.2 logits"]
    assert "tokens" in report.levels or kind == "int8"
    assert "切开之前" in "".join(report.notes)
    assert json.loads((path / "reports/parity.json").read_text(encoding="utf-8"))["cases"]
    assert set(children()) <= before


def test_a_wrong_stage_is_named(bundles, tmp_path):
    """CLUSTER-11：一层的权重不对，连起来的不通过，单独的只有那一层所在的 stage 不通过。"""
    bundle = Bundle.open(bundles("baseline"))
    name = "model.layers.2.self_attn.o_proj.weight"
    bad = tampered(bundle, tmp_path, edit_weight(bundle, name, lambda array: array + np.float32(0.05)))
    stages = deepseek_export.split(bad.path, tmp_path / "stages", "0-1,2-3,4")
    report = deepseek_export.verify(stages.path, levels=("model",))
    failed = {case.name.split()[0] for case in report.cases if not case.passed}
    assert {name for name in failed if name.startswith("stage.")} == {"stage.1"}
    assert any(name.startswith("logits") for name in failed)


def test_measured_like_a_bundle(bundles, split):
    """CLUSTER-11：``dsx bench`` 收一套 stage，可以与一个进程的互为对照。"""
    scenario = Scenario(prompt_len=5, new_tokens=3, depths=(16,), runs=1, threads=1)
    report = bench_bundle(
        split("float32", 2), against=bundles("float32"), scenario=scenario, verify_weights=True
    )
    assert report.subjects["bundle"].memory is None
    assert report.subjects["against"].memory is not None
    assert {"bundle/plain", "bundle/speculative"} <= set(report.ways)


def test_other_commands_want_the_bundle(split):
    """CLUSTER-11：截图、写成 Triton 的模型要切开之前的 bundle。"""
    path = split("float32", 2)
    refused("DSX-E748", deepseek_export.compare, path)
    refused("DSX-E748", deepseek_export.pack_triton, path, path.with_name("repository"))
    backend = PipelineBackend(StageSet.open(path), backend_named("ort"))
    refused("DSX-E748", backend.cut_runner, backend.prepared(StageSet.open(path).bundle))


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("micro", [2, 3, 9])
def test_micro_batches_equal_running_them_one_by_one(bundles, split, kind, micro):
    """CLUSTER-12：分成几个小批与一个进程依次跑它们逐位相同，行的次序不变；比行多的自动少分，比 stage 多的排着队进。"""
    rng = np.random.default_rng(0)
    ids, past = rng.integers(0, 160, (5, 6)), np.zeros(5, np.int64)
    at = np.tile([1, 5], (5, 1))
    alone = deepseek_export.load(bundles(kind), 1).session
    parts = np.array_split(np.arange(5), min(micro, 5))
    whole = alone.new_caches(5)
    want = []
    for lens, width in ((past, 6), (past + 6, 1)):
        places = at if width == 6 else np.zeros((5, 1), np.int64)
        want.append(
            np.concatenate(
                [
                    alone.run(
                        ids[rows, :width], lens[rows], places[rows], whole.rows(int(rows[0]), len(rows))
                    ).copy()
                    for rows in parts
                ]
            )
        )
    with loaded(split(kind, 3), cluster=ClusterSettings(micro_batches=micro)) as model:
        caches = model.session.new_caches(5)
        assert np.array_equal(model.session.run(ids, past, at, caches), want[0])
        step = model.session.run(ids[:, :1], past + 6, np.zeros((5, 1), np.int64), caches)
        assert np.array_equal(step, want[1])


def test_large_micro_batches_do_not_wait_for_each_other(split):
    """CLUSTER-12：每一帧都比套接字的缓冲区大得多，比 stage 多的几帧，照样走完；投机的也是。"""
    with loaded(split("float32", 3), cluster=ClusterSettings(micro_batches=7)) as model:
        rng = np.random.default_rng(1)
        rows = rng.integers(0, 160, (12, 300)).tolist()
        assert [len(logits) for logits in model.generator.logits(rows)] == [300] * 12
        found = model.generate(rows, 8, ignore_eos=True)
        assert [len(ids) for ids in found.token_ids] == [8] * 12
