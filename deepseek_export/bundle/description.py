"""导出写下的说明：manifest.json 与 ONNX 文件的标题，由检查点、要求与写好的图得到。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from deepseek_export.bundle.by_reference import BY_RECIPE_FILE
from deepseek_export.bundle.disk import sha256_file
from deepseek_export.bundle.graph import external_location, value_entry
from deepseek_export.bundle.manifest import (
    SCHEMA_VERSION,
    CacheDtype,
    CacheEntry,
    CacheTensorEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    SourceEntry,
    WeightsEntry,
    WeightsMode,
)
from deepseek_export.calibration import CalibrationText
from deepseek_export.capture import CapturedModel
from deepseek_export.checkpoint import Checkpoint, ModelConfig
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.passes import LoweredModel
from deepseek_export.profile import OptimizationProfile
from deepseek_export.records import TENSORRT_TARGETS, ModelDtype
from deepseek_export.reference.model import INDEX_CACHE, CacheTensor, Forms, cache_tensors
from deepseek_export.reference.weights import by_torch, torch_dtype
from deepseek_export.version import __version__


@dataclass(frozen=True)
class ExportSettings:
    """要一份怎样的 bundle。

    Attributes:
        profile: 优化方案。
        target: ``portable``、``ort-cpu``、``tensorrt`` 或 ``tensorrt-rtx``。
        dtype: 计算与权重的 dtype（router 始终 float32）。
        weights: ``packed`` 逐块写成自包含的权重文件；``reference`` 不写权重，指进检查点自己的 safetensors。
        hash_weights: 按引用时也记下检查点每个文件整个的 sha256：有下载记录的取自那里，没有的读一遍；``False`` 不记，记进 ``fallbacks``，以后证明不了它没有变。
            打包的写的时候就算好了，与此无关。
        quantization: 只量化权重；``None`` 不量化。
        calibration: 按这段文本校准 int4 的码；``None`` 取最近的码。
    """

    profile: OptimizationProfile
    target: str = "portable"
    dtype: ModelDtype = "float32"
    weights: WeightsMode = "packed"
    hash_weights: bool = True
    quantization: Quantization | None = None
    calibration: CalibrationText | None = None


@dataclass
class ExportedGraph:
    """一张图从捕获到写盘的各个阶段。"""

    file: str
    captured: CapturedModel
    lowered: LoweredModel
    model: onnx.ModelProto = field(default_factory=onnx.ModelProto)


def graph_label(
    config: ModelConfig, settings: ExportSettings, graph: ExportedGraph
) -> tuple[str, dict[str, str]]:
    """写进 ONNX 文件的标题与几样事实；别处已经写了目标与方案。"""
    quantization = settings.quantization
    layers, cache = graph.captured.layers, settings.profile.mla.cache_dtype
    facts = {
        "family": config.family,
        "role": graph.captured.role,
        "layers": str(len(layers)),
        "moe_layers": str(sum(map(config.is_moe_layer, layers))),
        "dtype": settings.dtype,
        "cache_dtype": settings.dtype if cache == "model" else cache,
        "quantization": "none" if quantization is None else f"{quantization.kind}/{quantization.block}",
    }
    what = {"main": "主模型", "draft": "草稿模型"}[graph.captured.role]
    return f"{config.family} 的{what}，编译到 {settings.target}；输入输出的约定见 manifest.json", facts


def manifest_of(
    source: Checkpoint,
    settings: ExportSettings,
    graphs: list[ExportedGraph],
    weights: WeightsEntry,
    fallbacks: list[str],
    library: CpuLibrary | None,
    files: dict[str, FileEntry],
    islands: Mapping[str, Mapping[str, list[str]]],
) -> Manifest:
    """整份 manifest；量化了哪些另补。"""
    config, profile, dtype = source.config, settings.profile, settings.dtype
    cache_dtype = dtype if profile.mla.cache_dtype == "model" else profile.mla.cache_dtype
    counts: Counter[str] = Counter()
    for found in islands.values():
        counts.update({op: len(names) for op, names in found.items()})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        dsx_version=__version__,
        target=settings.target,
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
            config,
            profile,
            dtype,
            cache_dtype,
            [i for graph in graphs for i in graph.captured.layers],
            settings.target in TENSORRT_TARGETS,
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
    aligned: bool,
) -> CacheEntry:
    """各层的缓存归成几种；不是每一层都有的写明哪些层，与 ``cache_dtype`` 不同的写明 dtype。``aligned`` 见 :meth:`ModelConfig.latent_cache_width`。"""
    found: dict[CacheTensor, list[int]] = {}
    forms = Forms.for_capture(profile)
    for layer in layers:
        stored, compute = torch_dtype(cache_dtype), torch_dtype(dtype)
        for tensor in cache_tensors(config, forms, stored, compute, layer, aligned):
            found.setdefault(tensor, []).append(layer)
    return CacheEntry(
        tensors=[
            CacheTensorEntry(
                name=tensor.name,
                heads=tensor.heads,
                width=tensor.width,
                dtype=None if tensor.dtype == torch_dtype(cache_dtype) else by_torch(tensor.dtype).name,
                layers=owners if tensor.name == INDEX_CACHE else None,
            )
            for tensor, owners in found.items()
        ],
        dtype=cache_dtype,
        num_layers=len(layers),
    )


def _graph_entry(graph: ExportedGraph) -> GraphEntry:
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
