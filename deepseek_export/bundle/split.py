"""切分：bundle → 一套 stage。

图在层的边上切开（:mod:`.cutting`），权重按段拷贝：打包的只拷自己的字节，按引用的只硬链接用得到的检查点文件。一次只有一小块在内存里，
与模型多大无关。几个 stage 都要的权重（草稿模块与首段共有的词嵌入）写成单独的一个文件，在同一个文件系统上各 stage 硬链接到它。
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import onnx

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.by_reference import BY_RECIPE_FILE, link_file
from deepseek_export.bundle.cutting import LayerCutter, mark_stage
from deepseek_export.bundle.disk import (
    WEIGHTS_FOLDER,
    atomic_directory,
    check_free_space,
    disk_errors,
    link_or_copy,
    output_path,
    sha256_file,
    write_json,
)
from deepseek_export.bundle.foreign import check_stages_replaceable
from deepseek_export.bundle.graph import Slot, check_onnx, external_location, point_at, value_entry
from deepseek_export.bundle.manifest import FileEntry, GraphEntry, Manifest, StageEntry, WeightsEntry
from deepseek_export.bundle.packed import WEIGHTS_FILE, copy_packed
from deepseek_export.bundle.stages import STAGES_FILE, StageItem, StageSet, StagesFile, requested_cuts
from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.int4_weights import stored_parts, weight_shape
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.store import INDEX_NAME
from deepseek_export.errors import DsxError
from deepseek_export.plan.balance import balanced
from deepseek_export.progress import Progress
from deepseek_export.version import __version__

#: 几个 stage 共有的权重。
SHARED_FILE = f"{WEIGHTS_FOLDER}/shared.safetensors"
#: 切得均匀的是什么。
Balance = Literal["bytes", "time"]
#: 词嵌入只查几行。
_EMBED = "model.embed_tokens.weight"
_EXPERTS = ".mlp.experts."
#: 不随 stage 走的文件夹。
_LEFT_BEHIND = {WEIGHTS_FOLDER, "engines", "reports"}


@dataclass
class _Stage:
    """一个 stage 的图，文件名 → 模型；``main`` 是主模型那一张的文件名。"""

    index: int
    begin: int
    end: int
    main: str
    graphs: dict[str, onnx.ModelProto]

    @property
    def directory(self) -> str:
        return f"stage.{self.index}"

    @property
    def weights(self) -> list[str]:
        """用到的外部权重，各列一次。"""
        names = (t.name for m in self.graphs.values() for t in m.graph.initializer if external_location(t))
        return list(dict.fromkeys(names))


def split_bundle(
    bundle: Path | str,
    out: Path | str,
    stages: int | str,
    *,
    balance: Balance = "bytes",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> StageSet:
    """把一个 bundle 切成几个 stage。

    Args:
        bundle: 要切的 bundle，不会被修改。
        out: 这套 stage 的目录；要么完整出现，要么不出现。
        stages: 几个，切得尽量均匀；或写明各段的层，``"0-14,15-29"``。
        balance: 只写几个时，什么尽量均匀：``bytes`` 是权重的字节数，``time`` 是解码一个 token 要读的字节数。
        overwrite: 允许替换已有的一套 stage。
        progress: 进度。

    Raises:
        DsxError: ``DSX-E740`` ``stages`` 给得不对；``DSX-E746`` 图不能在这里切开；``DSX-E748`` 已经是一个 stage；``DSX-E401`` 已存在；
            ``DSX-E404`` 空间不足；``DSX-E407`` 按引用而不在一个文件系统；其余见 ``Bundle.open``。
    """
    progress = progress or Progress()
    source = Bundle.open(bundle)
    if source.manifest.stage is not None:
        raise DsxError("DSX-E748", f"{source.path} 已经是一个 stage，不再切", "从切开之前的 bundle 重新切")
    out = output_path(out)
    check_stages_replaceable(out, overwrite)
    progress.start("读计算图")
    with source.steady():
        plan = _plan(source, stages, balance)
        with atomic_directory(out, overwrite, STAGES_FILE) as directory:
            _write(source, plan, directory, progress)
    return StageSet.open(out)


def _plan(bundle: Bundle, stages: int | str, balance: Balance) -> list[_Stage]:
    """切在哪里，以及切好的图；图里只有结构，不含权重。"""
    manifest = bundle.manifest
    layers = len(manifest.main.layers)
    main = onnx.load(bundle.path / manifest.main.file, load_external_data=False)
    drafts = {
        graph.file: onnx.load(bundle.path / graph.file, load_external_data=False) for graph in manifest.drafts
    }
    cutter = LayerCutter(main, layers)
    spans = requested_cuts(stages, layers)
    if isinstance(spans, int):
        spans = _balanced(manifest, cutter, drafts.values(), spans, balance)
    found = []
    for index, (begin, end) in enumerate(spans):
        graphs = {manifest.main.file: cutter.cut(begin, end)} | (drafts if end == layers else {})
        for model in graphs.values():
            mark_stage(model, index, len(spans))
        found.append(_Stage(index, begin, end, manifest.main.file, graphs))
    return found


def _balanced(
    manifest: Manifest,
    cutter: LayerCutter,
    drafts: Iterable[onnx.ModelProto],
    wanted: int,
    balance: Balance,
) -> list[tuple[int, int]]:
    layers = len(manifest.main.layers)
    weigh = _nbytes if balance == "bytes" else _read_per_token

    def weight(names: Iterable[str]) -> float:
        return sum(weigh(manifest, name) for name in names)

    # 沿用选择的层与前面排名的那一层之间还有别的要过（DSX-E746），总在一起；别的模型一层是一组。
    starts = [layer for layer in range(layers) if manifest.model.chooser_of(layer) in (None, layer)]
    groups = list(pairwise([*starts, layers]))
    if wanted > len(groups):
        what = f"{manifest.model.family} 的有些层沿用前面一层选的 key，要与那一层在一起，切不成 {wanted} 个 stage"
        raise DsxError("DSX-E740", what, f"--stages 至多 {len(groups)}")
    used = [set(cutter.weights(begin, end)) for begin, end in groups]
    # 首尾两层的图里还有词嵌入、输出头，它们不随那一层走。
    ends = {name for at in (0, -1) for name in used[at] if not _in_layers(name)}
    head = {name for name in used[-1] if name in ends}
    for model in drafts if balance == "bytes" else ():  # 草稿模块跑不跑、几个，由生成的时候定
        head |= {tensor.name for tensor in model.graph.initializer if external_location(tensor)}
    first = weight(name for name in used[0] if name in ends and not (balance == "time" and name == _EMBED))
    spans = balanced([weight(names - ends) for names in used], first, weight(head), wanted)
    return [(groups[begin][0], groups[end - 1][1]) for begin, end in spans]


def _nbytes(manifest: Manifest, name: str) -> float:
    return manifest.weights.recipes[name].nbytes


def _read_per_token(manifest: Manifest, name: str) -> float:
    """解码一个 token 读它多少字节：路由专家只读选中的。"""
    config, routed = manifest.model, _EXPERTS in name
    sparse = manifest.profile.moe.enabled and routed and config.n_routed_experts
    share = config.num_experts_per_tok / config.n_routed_experts if sparse else 1.0
    return _nbytes(manifest, name) * share


def _in_layers(name: str) -> bool:
    return ".layers." in name


def _write(bundle: Bundle, plan: Sequence[_Stage], directory: Path, progress: Progress) -> None:
    manifest = bundle.manifest
    if manifest.weights.mode == "packed":
        weights = _copy_weights(bundle, plan, directory, progress)
    else:
        weights = _link_weights(bundle, plan, directory)
    carried = _carried(bundle)
    items = []
    for stage in plan:
        progress.start(f"写 {stage.directory}")
        folder = directory / stage.directory
        with disk_errors(folder):
            entries = {name: _copied(bundle, name, folder) for name in carried}
            for name, model in stage.graphs.items():
                onnx.save(model, folder / name)
                check_onnx(folder / name)
                entries[name] = _file_entry(folder / name)
            made = _stage_manifest(manifest, stage, len(plan), weights[stage.index], entries)
            write_json(folder / "manifest.json", made.model_dump(mode="json"))
            digest = sha256_file(folder / "manifest.json")
        nbytes = sum(recipe.nbytes for recipe in made.weights.recipes.values())
        layers = list(range(stage.begin, stage.end))
        items.append(
            StageItem(directory=stage.directory, layers=layers, weight_bytes=nbytes, manifest_sha256=digest)
        )
    with disk_errors(directory):
        files = {name: _copied(bundle, name, directory) for name in carried}
    graphs = [
        graph.model_copy(update={"passes": [], "sites": [], "by_recipe": []}) for graph in manifest.graphs
    ]
    whole = manifest.model_copy(
        update={
            "graphs": graphs,
            "weights": WeightsEntry(mode="packed", files=[], recipes={}),
            "files": {graph.file: manifest.files[graph.file] for graph in graphs},
        }
    )
    record = StagesFile(dsx_version=__version__, whole=whole, stages=items, files=files)
    with disk_errors(directory):
        write_json(directory / STAGES_FILE, record.model_dump(mode="json"))


@dataclass(frozen=True)
class _Weights:
    """一个 stage 的权重文件：``files`` 的次序就是 manifest 里的；``hashed`` 是其中知道 sha256 的。"""

    entry: WeightsEntry
    hashed: dict[str, FileEntry]
    fingerprint_files: frozenset[str] | None = None


def _copy_weights(
    bundle: Bundle, plan: Sequence[_Stage], directory: Path, progress: Progress
) -> list[_Weights]:
    """打包的：每个 stage 只拷自己的字节；几个都要的另成一个文件。图里的位置随之改写。"""
    recipes = bundle.manifest.weights.recipes
    counts = Counter(name for stage in plan for name in stage.weights)
    shared = {name: recipe for name, recipe in recipes.items() if counts[name] > 1}
    check_free_space(directory, sum(recipes[name].nbytes for name in counts))
    slots = {
        tensor.name: _slot(tensor)
        for stage in plan
        for model in stage.graphs.values()
        for tensor in model.graph.initializer
        if external_location(tensor)
    }
    progress.start("拷权重", sum(recipes[name].nbytes for name in counts), "bytes")
    common: Path | None = None
    common_entry: FileEntry | None = None
    moved_shared: dict[str, Slot] = {}
    found = []
    for stage in plan:
        folder = directory / stage.directory
        names = set(stage.weights)
        own = {name: recipe for name, recipe in recipes.items() if name in names - shared.keys()}
        packed = copy_packed(folder, WEIGHTS_FILE, own, slots, bundle.path, progress)
        moved, files, hashed = dict(packed.slots), [WEIGHTS_FILE], {WEIGHTS_FILE: packed.entry}
        if names & shared.keys():
            target = folder / SHARED_FILE
            if common is None:
                made = copy_packed(folder, SHARED_FILE, shared, slots, bundle.path, progress)
                common, common_entry, moved_shared = target, made.entry, made.slots
            else:
                with disk_errors(target):
                    link_or_copy(common, target)
            assert common_entry is not None
            files.append(SHARED_FILE)
            hashed[SHARED_FILE] = common_entry
            moved |= {name: slot for name, slot in moved_shared.items() if name in names}
        for model in stage.graphs.values():
            for tensor in model.graph.initializer:
                if external_location(tensor):
                    point_at(tensor, moved[tensor.name])
        mine = {name: recipe for name, recipe in recipes.items() if name in names}
        found.append(_Weights(WeightsEntry(mode="packed", files=files, recipes=mine), hashed))
    return found


def _link_weights(bundle: Bundle, plan: Sequence[_Stage], directory: Path) -> list[_Weights]:
    """按引用的：每个 stage 只硬链接它的配方用到的检查点文件；索引也只留这些文件的。"""
    manifest, source = bundle.manifest, bundle.path / WEIGHTS_FOLDER
    store = TensorStore.open(source)
    found = []
    for stage in plan:
        folder = directory / stage.directory / WEIGHTS_FOLDER
        names = set(stage.weights)
        recipes = {name: recipe for name, recipe in manifest.weights.recipes.items() if name in names}
        needed = {
            store[tensor].file.name for recipe in recipes.values() for tensor in _sources(recipe, store)
        }
        kept = [file.name for file in store.files if file.name in needed]
        with disk_errors(folder):
            folder.mkdir(parents=True)
            for name in kept:
                link_file(source / name, folder)
            if (source / INDEX_NAME).is_file():
                index = json.loads((source / INDEX_NAME).read_bytes())
                index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v in needed}
                write_json(folder / INDEX_NAME, index)
            shutil.copyfile(bundle.path / BY_RECIPE_FILE, directory / stage.directory / BY_RECIPE_FILE)
        files = [f"{WEIGHTS_FOLDER}/{name}" for name in kept]
        hashed = {name: manifest.files[name] for name in files if name in manifest.files}
        extra = [BY_RECIPE_FILE, f"{WEIGHTS_FOLDER}/{INDEX_NAME}"]
        for name in extra:
            if (path := directory / stage.directory / name).is_file():
                hashed[name] = _file_entry(path)
        entry = WeightsEntry(mode="reference", files=files, recipes=recipes)
        found.append(_Weights(entry, hashed, frozenset(kept)))
    return found


def _sources(recipe: Recipe, store: TensorStore) -> Iterable[str]:
    """配方读的检查点张量；FP8 的 scale、4 位权重的各个张量与它在同一个文件里未必，也算。"""
    while recipe.of is not None:
        recipe = recipe.of
    for name in recipe.sources:
        if recipe.int4 is not None:
            shape = weight_shape(name, recipe.int4, store)
            yield from stored_parts(name, shape, recipe.int4)
            continue
        yield name
        if recipe.block_size is not None:
            yield f"{name}_scale_inv"


def _stage_manifest(
    manifest: Manifest, stage: _Stage, count: int, weights: _Weights, files: Mapping[str, FileEntry]
) -> Manifest:
    """stage 自己的 manifest：图、缓存、权重、文件都只是它的；模型、方案、出处仍是整个的。"""
    graphs = [
        _graph_entry(graph, stage, stage.graphs[graph.file])
        for graph in manifest.graphs
        if graph.file in stage.graphs
    ]
    source = manifest.source
    if weights.fingerprint_files is not None:
        kept = tuple(one for one in source.fingerprint.files if one.name in weights.fingerprint_files)
        fingerprint = source.fingerprint.model_copy(update={"files": kept})
        source = source.model_copy(update={"fingerprint": fingerprint})
    layers = sum(len(graph.layers) for graph in graphs)
    return manifest.model_copy(
        update={
            "graphs": graphs,
            "source": source,
            "cache": manifest.cache.model_copy(update={"num_layers": layers}),
            "weights": weights.entry,
            "files": dict(sorted((dict(files) | weights.hashed).items())),
            "stage": StageEntry(index=stage.index, count=count),
        }
    )


def _graph_entry(graph: GraphEntry, stage: _Stage, model: onnx.ModelProto) -> GraphEntry:
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph.node)
    layers = graph.layers[stage.begin : stage.end] if graph.role == "main" else graph.layers
    pointed = {tensor.name for tensor in model.graph.initializer}
    return graph.model_copy(
        update={
            "layers": layers,
            "inputs": [value_entry(value) for value in model.graph.input],
            "outputs": [value_entry(value) for value in model.graph.output],
            "op_counts": dict(sorted(counts.items())),
            "passes": [],
            "sites": [site for site in graph.sites if site.layer in layers],
            "by_recipe": [name for name in graph.by_recipe if name in pointed],
        }
    )


def _slot(tensor: onnx.TensorProto) -> Slot:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    return Slot(facts["location"], int(facts["offset"]), int(facts["length"]))


def _carried(bundle: Bundle) -> list[str]:
    """配置与分词器：每个 stage、最外面各一份。"""
    graphs = {graph.file for graph in bundle.manifest.graphs}
    return [
        name
        for name in bundle.manifest.files
        if name not in graphs and Path(name).parts[0] not in _LEFT_BEHIND
    ]


def _copied(bundle: Bundle, name: str, folder: Path) -> FileEntry:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle.path / name, folder / name)
    return bundle.manifest.files[name]


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
