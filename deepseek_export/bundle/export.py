"""导出：检查点 → bundle。"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from deepseek_export.bundle.bundle import Bundle
from deepseek_export.bundle.by_reference import (
    UNHASHED,
    check_small,
    link_checkpoint,
    published_entries,
    reference_slots,
)
from deepseek_export.bundle.calibrated import (
    WeightSource,
    check_calibration,
    scratch_bytes,
    weight_source,
)
from deepseek_export.bundle.description import ExportedGraph, ExportSettings, graph_label, manifest_of
from deepseek_export.bundle.disk import (
    atomic_directory,
    check_free_space,
    disk_errors,
    hash_files,
    output_lock,
    output_path,
    write_json,
)
from deepseek_export.bundle.foreign import check_replaceable
from deepseek_export.bundle.graph import (
    Slot,
    bind_external,
    check_onnx,
    float32_islands,
    label,
)
from deepseek_export.bundle.manifest import (
    FileEntry,
    QuantizationEntry,
    WeightsEntry,
)
from deepseek_export.bundle.packed import WEIGHTS_FILE, write_packed
from deepseek_export.bundle.quantization import check_keep, quantization_report
from deepseek_export.capture import CapturedModel, capture_draft, capture_model
from deepseek_export.checkpoint import (
    Checkpoint,
    ModelConfig,
    dtype_conflict,
    require_mtp,
    stop_token_ids,
)
from deepseek_export.checkpoint.bind import bind_recipes, int4_layout
from deepseek_export.checkpoint.fp8_sources import Fp8Sources
from deepseek_export.checkpoint.int4_published import int4_notes
from deepseek_export.checkpoint.recipe import (
    Recipe,
)
from deepseek_export.cpu_library import LIBRARY_TARGET, NO_LIBRARY, CpuLibrary, library_for
from deepseek_export.errors import DsxError
from deepseek_export.passes import (
    check_cache,
    check_quantization,
    check_target,
    lower,
)
from deepseek_export.paths import check_readable, optional_file
from deepseek_export.plan.written import written_bytes
from deepseek_export.progress import Progress
from deepseek_export.records import TENSORRT_TARGETS

MODEL_FILE = "model.onnx"

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
    settings: ExportSettings,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    accept: Callable[[Path], None] = lambda directory: None,
    notes: tuple[str, ...] = (),
) -> Bundle:
    """导出一个检查点；从头到尾占住 ``out``。

    Args:
        checkpoint: Hugging Face 检查点目录。
        out: bundle 目录；要么完整出现，要么不出现。
        settings: 要一份怎样的。
        overwrite: 允许替换已有的 bundle。
        progress: 进度。
        accept: 改名之前在临时目录上执行；抛异常则整个导出作废（导出时校验用）。
        notes: 额外写进 manifest 的回退说明。

    Returns:
        打开的 :class:`Bundle`。

    Raises:
        DsxError: 1xx 检查点、2xx 捕获、3xx pass、4xx 磁盘与路径、``DSX-E520`` / ``DSX-E521`` 算子库用不了；``DSX-E136`` 方案说了索引 key 怎么存，模型没有索引器；``DSX-E119`` 方案打开了 MTP 而检查点没有；
            ``DSX-E310`` / ``DSX-E311`` 不能量化；``DSX-E312`` ``keep`` 里有什么也没匹配到的；``DSX-E313`` 没有可量化的权重；``DSX-E660`` 不能校准；``DSX-E322`` 目标不支持 int8 缓存。
    """
    # 便宜的检查先做：捕获要好几秒，不该跑完才说目标不存在或目录已占用。
    check_target(settings.target, settings.dtype)
    if settings.quantization is not None:
        check_quantization(settings.target, settings.dtype)
    if settings.calibration is not None:
        check_calibration(settings)
    out = output_path(out)
    check_replaceable(out, overwrite)
    with output_lock(out):
        check_replaceable(out, overwrite)  # 占住之前，别人可能刚好写完
        export = _Export(settings, progress or Progress())
        source = export.open(checkpoint, out)
        export.compile(source)
        fallbacks = export.fallbacks(source, notes)
        if settings.weights == "packed":  # 有的权重没有换成：这时才知道真正要写多少
            check_free_space(out, export.weight_bytes + export.scratch_bytes(source))
        with atomic_directory(out, overwrite) as directory:
            export.write(source, directory, fallbacks)
            accept(directory)
            check_replaceable(out, overwrite)  # 别人的文件可能是这几分钟里放进去的
        return Bundle.open(out)


class _Export:
    """一次导出：读检查点、逐张图捕获与下沉、写盘；中间的产物都在这里。"""

    def __init__(self, settings: ExportSettings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        self.watch = _Stopwatch()
        self.graphs: list[ExportedGraph] = []
        self.recipes: dict[str, Recipe] = {}
        self._modules = 0
        self._library: CpuLibrary | None = None

    @property
    def weight_bytes(self) -> int:
        """全部权重，按引用的也算。"""
        return sum(recipe.nbytes for recipe in self.recipes.values())

    def scratch_bytes(self, source: Checkpoint) -> int:
        """导出时另外临时占的磁盘。"""
        return scratch_bytes(self.recipes, source) if self.settings.calibration is not None else 0

    @property
    def quantized(self) -> list[str]:
        """真正换成量化算子的权重。"""
        return sorted(set[str]().union(*(graph.lowered.quantized for graph in self.graphs)))

    def open(self, checkpoint: Path | str, out: Path) -> Checkpoint:
        """打开检查点；这里就知道做不成的，现在就说。"""
        settings = self.settings
        self.progress.start("读检查点")
        with self.watch("checkpoint"):
            source = Checkpoint.open(checkpoint)
            sparse = source.config.indexer is not None
            settings.profile.check_model(source.config.family, sparse)
            check_cache(settings.target, settings.profile, sparse)
            stop_token_ids(source.path, source.config)
            _carried_files(source.path)
            self._modules = require_mtp(source) if settings.profile.mtp.enabled else 0
            needed = packed_bytes(source, settings) if settings.weights == "packed" else 0
            check_free_space(out, needed)
            if settings.quantization is not None:
                check_keep(settings.quantization, source.config, self._modules)
        return source

    def compile(self, source: Checkpoint) -> None:
        """主模型与各个 MTP 模块：捕获，下沉，权重绑到检查点的张量。"""
        # 权重怎么存与捕获无关：FP8、4 位的检查点与它反量化后的孪生捕获到同一张图。
        architecture = replace(source.config, weight_block_size=None, int4=None)
        fp8 = Fp8Sources.of(source) if self.settings.target in TENSORRT_TARGETS else None
        for index in range(-1, self._modules):
            with self.watch("capture"):
                self.progress.start("捕获计算图" if index < 0 else f"捕获 MTP 模块 {index}")
                captured = self._capture(architecture, index)
            with self.watch("passes"):
                self.progress.start(f"下沉到 {self.settings.target}")
                lowered = lower(
                    captured,
                    config=architecture,
                    profile=self.settings.profile,
                    dtype=self.settings.dtype,
                    target=self.settings.target,
                    quantization=self.settings.quantization,
                    fp8=fp8,
                    int4=partial(int4_layout, source),
                )
            self.graphs.append(ExportedGraph(_file_name(index), captured, lowered))
        for graph in self.graphs:
            self.recipes |= bind_recipes(graph.lowered.weights, source)
        self._library = library_for(self.settings.target)
        quantization = self.settings.quantization
        if quantization is not None and not self.quantized:
            kept = ",".join(quantization.keep) or "（空）"
            raise DsxError(
                "DSX-E313",
                f"方案 {self.settings.profile.name}、--keep {kept} 之下没有一个权重可以量化",
                "去掉 --quant，或少保留一些；换不了的原因见 dsx export -v",
            )

    def fallbacks(self, source: Checkpoint, notes: tuple[str, ...]) -> list[str]:
        """写进 manifest 的回退说明，各一遍；顺便显示出来。"""
        settings = self.settings
        lines = [*notes, *(line for graph in self.graphs for line in graph.lowered.fallbacks)]
        if settings.target == LIBRARY_TARGET and settings.profile.mla.enabled and self._library is None:
            lines.append(NO_LIBRARY)
        if conflict := dtype_conflict(source):
            lines.append(conflict)
        lines += int4_notes(self.recipes)
        if settings.weights == "reference" and not settings.hash_weights:
            lines.append(UNHASHED)
        found = list(dict.fromkeys(lines))
        for line in found:
            self.progress.note(line)
        return found

    def write(self, source: Checkpoint, directory: Path, fallbacks: list[str]) -> None:
        """写满 ``directory``：权重、图、带着的文件、manifest、报告；要校准的先校准。"""
        settings, errors = self.settings, {}
        calibration, modules = settings.calibration, self._modules
        with weight_source(
            source, self.recipes, calibration, modules, directory, self.progress, self.watch
        ) as weights:
            self.recipes = weights.recipes
            for line in weights.fallbacks:
                self.progress.note(line)
            fallbacks = [*fallbacks, *weights.fallbacks]
            with self.watch("weights"):
                slots, weight_files, hashed = self._write_weights(source, weights, directory)
            if settings.quantization is not None:
                errors = quantization_report(weights, self.progress)
        with self.watch("graph"):
            self._write_graphs(source, directory, slots)
        with disk_errors(directory):
            for file in _carried_files(source.path):
                shutil.copyfile(file, directory / file.name)
            with self.watch("hashes"):
                skipped = list(hashed) if settings.hash_weights else weight_files
                files = dict(sorted((hashed | hash_files(directory, skipped, self.progress)).items()))
            entry = WeightsEntry(mode=settings.weights, files=weight_files, recipes=self.recipes)
            islands = (
                {}
                if settings.dtype == "float32"
                else {graph.file: float32_islands(graph.model) for graph in self.graphs}
            )
            manifest = manifest_of(
                source, settings, self.graphs, entry, fallbacks, self._library, files, islands
            )
            report = self._report() | {"float32_islands": islands}
            if settings.quantization is not None:
                quantized = QuantizationEntry.of(settings.quantization, self.quantized, weights.entry)
                manifest = manifest.model_copy(update={"quantization": quantized})
                report["quantization"] = errors
            write_json(directory / "manifest.json", manifest.model_dump(mode="json"))
            (directory / "reports").mkdir()
            write_json(directory / "reports/export.json", report)

    def _capture(self, config: ModelConfig, index: int) -> CapturedModel:
        def on_step(step: str) -> None:
            self.progress.advance(0, step)

        profile, dtype = self.settings.profile, self.settings.dtype
        if index < 0:
            return capture_model(config, profile, dtype, on_step)
        return capture_draft(config, profile, index, dtype, on_step)

    def _write_weights(
        self, source: Checkpoint, weights: WeightSource, directory: Path
    ) -> tuple[dict[str, Slot], list[str], dict[str, FileEntry]]:
        """各个权重在哪个文件的哪里；权重文件的名字；已经算好哈希的。"""
        if self.settings.weights == "packed":
            packed = write_packed(directory, weights.recipes, weights.store, self.progress)
            return packed.slots, [WEIGHTS_FILE], {WEIGHTS_FILE: packed.entry}
        self.progress.start("链接检查点")
        check_small(self.recipes, source.store)
        with disk_errors(directory):
            weight_files = link_checkpoint(source.store, directory)
            hashed = published_entries(source.store, directory) if self.settings.hash_weights else {}
        if hashed:
            self.progress.note(
                f"{len(hashed)} 个权重文件的 sha256 取自 Hugging Face 的下载记录，没有读：第一次加载时读一遍核对"
            )
        return reference_slots(self.recipes, source.store), weight_files, hashed

    def _write_graphs(self, source: Checkpoint, directory: Path, slots: dict[str, Slot]) -> None:
        self.progress.start("写计算图并检查")
        for graph in self.graphs:
            graph.model = bind_external(graph.lowered.proto, slots)
            label(graph.model, *graph_label(source.config, self.settings, graph))
            with disk_errors(directory):
                onnx.save(graph.model, directory / graph.file)
            check_onnx(directory / graph.file)

    def _report(self) -> dict[str, Any]:
        return {
            "seconds": self.watch.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "weight_bytes": self.weight_bytes,
            "nodes": sum(len(graph.model.graph.node) for graph in self.graphs),
        }


def packed_bytes(source: Checkpoint, settings: ExportSettings) -> int:
    """打包的权重要写多少字节；动工之前的估计。

    Raises:
        DsxError: ``DSX-E119``，方案打开了 MTP 而检查点没有。
    """
    modules = require_mtp(source) if settings.profile.mtp.enabled else 0
    tensorrt = settings.target in TENSORRT_TARGETS
    parts = written_bytes(
        source.config,
        settings.profile,
        modules,
        settings.dtype,
        settings.quantization,
        tensorrt,
        Fp8Sources.of(source),
    )
    return sum(parts.values())


def _carried_files(directory: Path) -> list[Path]:
    """要原样带进 bundle 的文件；有而读不了的、不是普通文件的当场拒绝。

    Raises:
        DsxError: ``DSX-E501``；config.json 与 generation_config.json 另有人读过，到这里的都是分词器的。
    """
    files = [file for name in CARRIED_FILES if optional_file(file := directory / name, "DSX-E501")]
    for file in files:
        check_readable(file, "DSX-E501", "检查权限；不需要的话从检查点里移走")
    return files


def _file_name(index: int) -> str:
    """-1 是主模型；第 0 个 MTP 模块是 ``mtp.onnx``，其后 ``mtp.1.onnx``……"""
    return MODEL_FILE if index < 0 else "mtp.onnx" if index == 0 else f"mtp.{index}.onnx"
