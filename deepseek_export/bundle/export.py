"""导出：检查点 → bundle。"""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.by_reference import (
    BY_RECIPE_FILE,
    UNHASHED,
    check_small,
    link_checkpoint,
    reference_slots,
)
from deepseek_export.bundle.disk import (
    atomic_directory,
    check_free_space,
    disk_errors,
    hash_files,
    output_lock,
    output_path,
    sha256_file,
    write_json,
)
from deepseek_export.bundle.foreign import check_replaceable
from deepseek_export.bundle.graph import (
    bind_external,
    check_onnx,
    external_location,
    float32_islands,
    label,
    value_entry,
)
from deepseek_export.bundle.manifest import (
    SCHEMA_VERSION,
    CacheDtype,
    CacheEntry,
    CacheTensorEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    QuantizationEntry,
    SourceEntry,
    WeightsEntry,
    WeightsMode,
)
from deepseek_export.bundle.packed import WEIGHTS_FILE, write_packed
from deepseek_export.capture import CapturedModel, capture_draft, capture_model
from deepseek_export.checkpoint import (
    Checkpoint,
    ModelConfig,
    dtype_conflict,
    require_mtp,
    stop_token_ids,
)
from deepseek_export.checkpoint.recipe import (
    Recipe,
    bind_recipes,
    mtp_recipes,
    quantization_error,
    weight_recipes,
)
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cpu_library import LIBRARY_TARGET, NO_LIBRARY, CpuLibrary, library_for
from deepseek_export.errors import DsxError
from deepseek_export.passes import (
    LoweredModel,
    check_cache,
    check_quantization,
    check_target,
    lower,
)
from deepseek_export.paths import check_readable, optional_file
from deepseek_export.plan.written import written_bytes
from deepseek_export.profile import OptimizationProfile
from deepseek_export.progress import Progress
from deepseek_export.records import TENSORRT_TARGETS, ModelDtype
from deepseek_export.reference.model import INDEX_CACHE, CacheTensor, Forms, cache_tensors
from deepseek_export.reference.weights import torch_dtype
from deepseek_export.version import __version__

MODEL_FILE = "model.onnx"
_MOST_SENSITIVE = 5

#: 原样带进 bundle 的文件（存在才带）。
CARRIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class _Stopwatch:
    """各阶段用时（秒），写进 reports/export.json。"""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


def export_bundle(
    checkpoint: Path | str,
    out: Path | str,
    profile: OptimizationProfile,
    *,
    target: str = "portable",
    dtype: ModelDtype = "float32",
    weights: WeightsMode = "packed",
    hash_weights: bool = True,
    quantization: Quantization | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    accept: Callable[[Path], None] = lambda directory: None,
    notes: tuple[str, ...] = (),
) -> Bundle:
    """导出一个检查点；从头到尾占住 ``out``。

    Args:
        checkpoint: Hugging Face 检查点目录。
        out: bundle 目录；要么完整出现，要么不出现。
        profile: 优化方案。
        target: ``portable``、``ort-cpu``、``tensorrt`` 或 ``tensorrt-rtx``。
        dtype: 计算与权重的 dtype（router 始终 float32）。
        weights: ``packed`` 逐块写成自包含的权重文件；``reference`` 不写权重，指进检查点自己的 safetensors。
        hash_weights: 按引用时也读一遍检查点，记下每个文件整个的 sha256；``False`` 不为此读它，记进 ``fallbacks``，以后证明不了它没有变。
            打包的写的时候就算好了，与此无关。
        quantization: 只量化权重；``None`` 不量化。
        overwrite: 允许替换已有的 bundle。
        progress: 进度。
        accept: 改名之前在临时目录上执行；抛异常则整个导出作废（导出时校验用）。
        notes: 额外写进 manifest 的回退说明。

    Returns:
        打开的 :class:`Bundle`。

    Raises:
        DsxError: 1xx 检查点、2xx 捕获、3xx pass、4xx 磁盘与路径、``DSX-E520`` / ``DSX-E521`` 算子库用不了；``DSX-E119`` 方案打开了 MTP 而检查点没有；
            ``DSX-E310`` / ``DSX-E311`` 不能量化；``DSX-E312`` ``keep`` 里有什么也没匹配到的；``DSX-E313`` 没有可量化的权重；``DSX-E322`` 目标不支持 int8 缓存。
    """
    # 便宜的检查先做：捕获要好几秒，不该跑完才说目标不存在或目录已占用。
    check_target(target, dtype)
    check_cache(target, profile)
    if quantization is not None:
        check_quantization(target, dtype)
    out = output_path(out)
    check_replaceable(out, overwrite)
    with output_lock(out):
        check_replaceable(out, overwrite)  # 占住之前，别人可能刚好写完
        return _export(
            checkpoint,
            out,
            profile,
            target=target,
            dtype=dtype,
            weights=weights,
            hash_weights=hash_weights,
            quantization=quantization,
            overwrite=overwrite,
            progress=progress or Progress(),
            accept=accept,
            notes=notes,
        )


def _export(
    checkpoint: Path | str,
    out: Path,
    profile: OptimizationProfile,
    *,
    target: str,
    dtype: ModelDtype,
    weights: WeightsMode,
    hash_weights: bool,
    quantization: Quantization | None,
    overwrite: bool,
    progress: Progress,
    accept: Callable[[Path], None],
    notes: tuple[str, ...],
) -> Bundle:
    """:func:`export_bundle`，已经占住 ``out``。"""
    watch = _Stopwatch()
    progress.start("读检查点")
    with watch("checkpoint"):
        source = Checkpoint.open(checkpoint)
        stop_token_ids(source.path, source.config)
        carried = _carried_files(source.path)
        modules = require_mtp(source) if profile.mtp.enabled else 0
        needed = 0
        if weights == "packed":
            tensorrt = target in TENSORRT_TARGETS
            parts = written_bytes(source.config, profile, modules, dtype, quantization, tensorrt)
            needed = sum(parts.values())
        check_free_space(out, needed)
        if quantization is not None:
            _check_keep(quantization, source.config, modules)
    # 权重怎么存与图无关：FP8 检查点与它反量化后的孪生得到同一张图。
    architecture = replace(source.config, weight_block_size=None)
    graphs: list[_Graph] = []
    for index in range(-1, modules):
        with watch("capture"):
            progress.start("捕获计算图" if index < 0 else f"捕获 MTP 模块 {index}")
            captured = _capture(architecture, profile, dtype, index, progress)
        with watch("passes"):
            progress.start(f"下沉到 {target}")
            lowered = lower(
                captured,
                config=architecture,
                profile=profile,
                dtype=dtype,
                target=target,
                quantization=quantization,
            )
        graphs.append(_Graph(_file_name(index), captured, lowered))
    recipes: dict[str, Recipe] = {}
    for graph in graphs:
        recipes |= bind_recipes(graph.lowered.weights, source)
    library = library_for(target)
    lines = [*notes, *(line for graph in graphs for line in graph.lowered.fallbacks)]
    if target == LIBRARY_TARGET and profile.mla.enabled and library is None:
        lines.append(NO_LIBRARY)
    if conflict := dtype_conflict(source):
        lines.append(conflict)
    if weights == "reference" and not hash_weights:
        lines.append(UNHASHED)
    fallbacks = list(dict.fromkeys(lines))
    for line in fallbacks:
        progress.note(line)
    quantized = sorted(set[str]().union(*(graph.lowered.quantized for graph in graphs)))
    if quantization is not None and not quantized:
        what = (
            f"方案 {profile.name}、--keep {','.join(quantization.keep) or '（空）'} 之下没有一个权重可以量化"
        )
        raise DsxError("DSX-E313", what, "去掉 --quant，或少保留一些；换不了的原因见 dsx export -v")
    if weights == "packed":  # 有的权重没有换成：这时才知道真正要写多少
        check_free_space(out, sum(recipe.nbytes for recipe in recipes.values()))
    with atomic_directory(out, overwrite) as directory:
        with watch("weights"):
            if weights == "packed":
                packed = write_packed(directory, recipes, source.store, progress)
                slots, weight_files, hashed = packed.slots, [WEIGHTS_FILE], {WEIGHTS_FILE: packed.entry}
            else:
                progress.start("链接检查点")
                check_small(recipes, source.store)
                slots, hashed = reference_slots(recipes, source.store), {}
                with disk_errors(directory):
                    weight_files = link_checkpoint(source.store, directory)
        with watch("graph"):
            progress.start("写计算图并检查")
            for graph in graphs:
                graph.model = bind_external(graph.lowered.proto, slots)
                label(graph.model, *_label(source.config, profile, target, dtype, quantization, graph))
                with disk_errors(directory):
                    onnx.save(graph.model, directory / graph.file)
                check_onnx(directory / graph.file)
        with disk_errors(directory):
            for file in carried:
                shutil.copyfile(file, directory / file.name)
            with watch("hashes"):
                skipped = weight_files if weights == "packed" or not hash_weights else []
                files = dict(sorted((hashed | hash_files(directory, skipped, progress)).items()))
            entry = WeightsEntry(mode=weights, files=weight_files, recipes=recipes)
            islands = (
                {} if dtype == "float32" else {graph.file: float32_islands(graph.model) for graph in graphs}
            )
            manifest = _manifest(
                source, profile, target, dtype, graphs, entry, fallbacks, library, files, islands
            )
            report = _report(watch, graphs, recipes) | {"float32_islands": islands}
            if quantization is not None:
                manifest = manifest.model_copy(
                    update={"quantization": QuantizationEntry.of(quantization, quantized)}
                )
                report["quantization"] = _quantization_report(recipes, source, progress)
            write_json(directory / "manifest.json", manifest.model_dump(mode="json"))
            (directory / "reports").mkdir()
            write_json(directory / "reports/export.json", report)
        accept(directory)
        check_replaceable(out, overwrite)  # 别人的文件可能是这几分钟里放进去的
    return Bundle.open(out)


def _carried_files(directory: Path) -> list[Path]:
    """要原样带进 bundle 的文件；有而读不了的、不是普通文件的当场拒绝。

    Raises:
        DsxError: ``DSX-E501``；config.json 与 generation_config.json 另有人读过，到这里的都是分词器的。
    """
    files = [file for name in CARRIED_FILES if optional_file(file := directory / name, "DSX-E501")]
    for file in files:
        check_readable(file, "DSX-E501", "检查权限；不需要的话从检查点里移走")
    return files


@dataclass
class _Graph:
    """一张图从捕获到写盘的各个阶段。"""

    file: str
    captured: CapturedModel
    lowered: LoweredModel
    model: onnx.ModelProto = field(default_factory=onnx.ModelProto)


def _label(
    config: ModelConfig,
    profile: OptimizationProfile,
    target: str,
    dtype: ModelDtype,
    quantization: Quantization | None,
    graph: _Graph,
) -> tuple[str, dict[str, str]]:
    """写进 ONNX 文件的标题与几样事实；别处已经写了目标与方案。"""
    layers, cache = graph.captured.layers, profile.mla.cache_dtype
    facts = {
        "family": config.family,
        "role": graph.captured.role,
        "layers": str(len(layers)),
        "moe_layers": str(sum(map(config.is_moe_layer, layers))),
        "dtype": dtype,
        "cache_dtype": dtype if cache == "model" else cache,
        "quantization": "none" if quantization is None else f"{quantization.kind}/{quantization.block}",
    }
    what = {"main": "主模型", "draft": "草稿模型"}[graph.captured.role]
    return f"{config.family} 的{what}，编译到 {target}；输入输出的约定见 manifest.json", facts


def _file_name(index: int) -> str:
    """-1 是主模型；第 0 个 MTP 模块是 ``mtp.onnx``，其后 ``mtp.1.onnx``……"""
    return MODEL_FILE if index < 0 else "mtp.onnx" if index == 0 else f"mtp.{index}.onnx"


def _capture(
    config: ModelConfig, profile: OptimizationProfile, dtype: ModelDtype, index: int, progress: Progress
) -> CapturedModel:
    def on_step(step: str) -> None:
        progress.advance(0, step)

    if index < 0:
        return capture_model(config, profile, dtype, on_step)
    return capture_draft(config, profile, index, dtype, on_step)


def _manifest(
    source: Checkpoint,
    profile: OptimizationProfile,
    target: str,
    dtype: ModelDtype,
    graphs: list[_Graph],
    weights: WeightsEntry,
    fallbacks: list[str],
    library: CpuLibrary | None,
    files: dict[str, FileEntry],
    islands: Mapping[str, Mapping[str, list[str]]],
) -> Manifest:
    config = source.config
    cache_dtype = dtype if profile.mla.cache_dtype == "model" else profile.mla.cache_dtype
    counts: Counter[str] = Counter()
    for found in islands.values():
        counts.update({op: len(names) for op, names in found.items()})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        dsx_version=__version__,
        target=target,
        dtype=dtype,
        profile=profile,
        model=config,
        source=SourceEntry(
            path=str(source.path.resolve()),
            config_sha256=sha256_file(source.path / "config.json"),
            fingerprint=source.store.fingerprint(),
            mtp_tensors=len(source.mtp_tensors),
        ),
        graphs=[_graph_entry(graph) for graph in graphs],
        cache=_cache_entry(
            config, profile, dtype, cache_dtype, [i for graph in graphs for i in graph.captured.layers]
        ),
        weights=weights,
        fallbacks=fallbacks,
        cpu_library=None if library is None else library.isa,
        float32_islands=dict(sorted(counts.items())),
        files=files,
    )


def _cache_entry(
    config: ModelConfig,
    profile: OptimizationProfile,
    dtype: ModelDtype,
    cache_dtype: CacheDtype,
    layers: list[int],
) -> CacheEntry:
    """各层的缓存归成几种；不是每一层都有的写明哪些层，与 ``cache_dtype`` 不同的写明 dtype。"""
    found: dict[CacheTensor, list[int]] = {}
    forms = Forms.for_capture(profile)
    for layer in layers:
        for tensor in cache_tensors(config, forms, torch_dtype(cache_dtype), torch_dtype(dtype), layer):
            found.setdefault(tensor, []).append(layer)
    return CacheEntry(
        tensors=[
            CacheTensorEntry(
                name=tensor.name,
                heads=tensor.heads,
                width=tensor.width,
                dtype=None if tensor.dtype == torch_dtype(cache_dtype) else dtype,
                layers=owners if tensor.name == INDEX_CACHE else None,
            )
            for tensor, owners in found.items()
        ],
        dtype=cache_dtype,
        num_layers=len(layers),
    )


def _graph_entry(graph: _Graph) -> GraphEntry:
    proto = graph.model.graph
    counts = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in proto.node)
    return GraphEntry(
        file=graph.file,
        role=graph.captured.role,
        layers=list(graph.captured.layers),
        inputs=[value_entry(value) for value in proto.input],
        outputs=[value_entry(value) for value in proto.output],
        op_counts=dict(sorted(counts.items())),
        passes=graph.lowered.results,
        sites=graph.captured.sites,
        by_recipe=[t.name for t in proto.initializer if external_location(t) == BY_RECIPE_FILE],
    )


def _report(watch: _Stopwatch, graphs: list[_Graph], recipes: dict[str, Recipe]) -> dict:
    return {
        "seconds": watch.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weight_bytes": sum(recipe.nbytes for recipe in recipes.values()),
        "nodes": sum(len(graph.model.graph.node) for graph in graphs),
    }


def _check_keep(quantization: Quantization, config: ModelConfig, modules: int) -> None:
    names = [*weight_recipes(config, "float32"), "lm_head"]
    for index in range(modules):
        names += mtp_recipes(config, index, "float32")
    if unmatched := quantization.unmatched(names):
        raise DsxError(
            "DSX-E312",
            f"--keep 的 {unmatched[0]!r} 什么也没有匹配到",
            "按点分的整段写，例如 lm_head、o_proj、layers.0、layers.3.mlp；叠在一起的专家写成 mlp.experts",
        )


def _quantization_report(
    weights: dict[str, Recipe], source: Checkpoint, progress: Progress
) -> dict[str, Any]:
    """每个量化了的权重偏了多少，最敏感（相对误差最大）的几个点名。"""
    codes = {name: recipe for name, recipe in weights.items() if recipe.op == "codes"}
    progress.start("量化误差", len(codes))
    errors = {}
    for name, recipe in codes.items():
        errors[name] = quantization_error(name, recipe, source.store)
        progress.advance(1, name)
    ranked = sorted(errors, key=lambda name: errors[name].relative, reverse=True)
    return {
        "most_sensitive": ranked[:_MOST_SENSITIVE],
        "tensors": {name: errors[name].model_dump() for name in ranked},
    }
