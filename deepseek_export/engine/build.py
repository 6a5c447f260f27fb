"""TensorRT 目标的 bundle → 一种 SM 的引擎目录。"""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx

from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.by_reference import BY_RECIPE_FILE
from deepseek_export.bundle.disk import (
    atomic_directory,
    check_free_space,
    disk_errors,
    link_or_copy,
    sha256_file,
    write_json,
)
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.checkpoint.weight_only import packed_int4
from deepseek_export.engine.derived import check_buildable
from deepseek_export.engine.flavour import (
    Flavour,
    check_arch,
    layer_information,
    load,
    network_flags,
    select_arch,
)
from deepseek_export.engine.graph import engine_graph
from deepseek_export.engine.interrupts import deferred_interrupts
from deepseek_export.engine.layers import (
    EngineLayer,
    activation_bytes,
    copied_caches,
    layer_counts,
    missing_plugins,
    parse_layers,
    unfused_attention,
    weight_bytes,
)
from deepseek_export.engine.logger import logger_for
from deepseek_export.engine.plugins import BuildTarget, building_for, registered_creators
from deepseek_export.engine.record import ENGINES, LAYERS_FILE, RECORD_FILE, EngineEntry, EngineRecord
from deepseek_export.engine.shapes import ProfileShapes, Range
from deepseek_export.errors import DsxError
from deepseek_export.kernels.compile import toolkit_version
from deepseek_export.ops.table import (
    INDEX_TOPK,
    LATENT_CACHE_UPDATE,
    MOE_EXPERTS,
    QUANTIZED_LINEAR,
    QUANTIZED_MOE_EXPERTS,
)
from deepseek_export.progress import Progress
from deepseek_export.version import __version__

NO_INITIALIZERS: Mapping[str, np.ndarray] = MappingProxyType({})
#: (builder, network, config) → plan；``None`` 是 TensorRT 报错。
Serializer: TypeAlias = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class BuiltEngine:
    """一个建好的引擎目录。

    Attributes:
        bundle: 由它建成；引擎目录在它的 ``engines/`` 里。
        path: 目录。
        record: ``engine.json``。
        layers: 引擎的文件名 → 优化配置名 → 各层。
    """

    bundle: Bundle
    path: Path
    record: EngineRecord
    layers: dict[str, dict[str, list[EngineLayer]]]


def build_engine(
    bundle: Bundle,
    sm: int,
    flavour: Flavour,
    shapes: ProfileShapes,
    progress: Progress | None = None,
) -> BuiltEngine:
    """为一种 SM 建引擎，写进 ``engines/<flavour>-sm<SM>/``；已有的整个换掉。

    Args:
        bundle: 建得了引擎的 bundle；任意一个先过 :func:`~deepseek_export.engine.derived.buildable_bundle`。
        sm: 目标计算能力，例如 89。
        flavour: 用哪种 TensorRT。
        shapes: 优化配置的形状。
        progress: 进度。

    Raises:
        DsxError: ``DSX-E901`` 起是 kernel 的；``DSX-E912`` 建不了这种 SM；``DSX-E913`` bundle 不合适；``DSX-E914`` TensorRT
            报错；``DSX-E915`` 有插件没有留在引擎里；``DSX-E922`` 引擎把缓存抄一遍；``DSX-E916`` 插件内部出错；``DSX-E412`` 建的时候 bundle 被换掉。
    """
    progress = progress or Progress()
    check_buildable(bundle)
    trt = load(flavour)
    check_arch(flavour, trt, sm)
    if sm in flavour.unproven:
        progress.note(
            f"{flavour.module} 在 sm{sm} 上运行不运行没有证据：NVIDIA 的支持表没有列它；"
            f"不行就在那台机器上用完整的 TensorRT：dsx build --flavour tensorrt"
        )
    out = bundle.path / ENGINES / f"{flavour.name}-sm{sm}"
    engines: dict[str, EngineEntry] = {}
    layers: dict[str, dict[str, list[EngineLayer]]] = {}
    with disk_errors(out):
        out.parent.mkdir(exist_ok=True)
    weights = BundleWeights(bundle)
    with bundle.steady(), atomic_directory(out, overwrite=True, marker=RECORD_FILE) as directory:
        _link_weights(bundle, directory)
        for entry in bundle.manifest.graphs:
            graph = engine_graph(bundle.path / entry.file, shapes.capacity)
            with disk_errors(directory):
                onnx.save(graph.model, directory / entry.file)
            profiles = shapes.profiles(bundle.manifest.profile, graph.key_span)
            began = time.perf_counter()
            made = weights.arrays(tensor.name for tensor in graph.model.graph.initializer)
            content, text = build_engine_bytes(
                trt, flavour, directory / entry.file, sm, profiles, progress, made
            )
            seconds = round(time.perf_counter() - began, 3)
            name = f"{entry.file.removesuffix('.onnx')}.plan"
            layers[name] = parse_layers(text, list(profiles), graph.plugins)
            for profile, found in layers[name].items():
                check_plugins(f"{name} 的 {profile} 配置", found, expected_plugins(profile, graph.plugins))
            check_caches(name, text, entry, shapes.capacity)
            unfused = unfused_attention(layers[name].get("prefill", ()), graph.attentions)
            if unfused:
                progress.note(
                    f"{name}：prefill 有 {len(unfused)} / {len(graph.attentions)} 层注意力没有融成一个原生核"
                )
            with disk_errors(directory):
                check_free_space(directory, len(content))
                (directory / name).write_bytes(content)
            engines[name] = EngineEntry(
                graph=entry.file,
                role=entry.role,
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                profiles={profile: dict(ranges) for profile, ranges in profiles.items()},
                layers={profile: layer_counts(found) for profile, found in layers[name].items()},
                fused_attention=len(graph.attentions) - len(unfused),
                unfused_attention=unfused,
                seconds=seconds,
                workspace=activation_bytes(logger_for(trt).messages(), list(profiles)),
                weights=weight_bytes(logger_for(trt).messages()),
                best=graph.best,
            )
        record = EngineRecord(
            schema_version=1,
            dsx_version=__version__,
            flavour=flavour.name,
            version=trt.__version__,
            sm=sm,
            toolkit=toolkit_version(sm),
            bundle_sha256=sha256_file(bundle.path / "manifest.json"),
            shapes=shapes,
            plans=engines,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        bundle.check_in_place()  # 换掉了的，record 里的哈希是新的，引擎却由旧的建成
        with disk_errors(directory):
            write_json(directory / RECORD_FILE, record.model_dump(mode="json"))
            listed = {
                name: {profile: [layer.model_dump() for layer in found] for profile, found in each.items()}
                for name, each in layers.items()
            }
            write_json(directory / LAYERS_FILE, listed)
    return BuiltEngine(bundle, out, record, layers)


def whole_plan(builder: Any, network: Any, config: Any) -> Any:
    """整个 plan，在 TensorRT 自己的内存里。"""
    return builder.build_serialized_network(network, config)


def build_engine_bytes(
    trt: Any,
    flavour: Flavour,
    model: Path,
    sm: int,
    profiles: Mapping[str, Mapping[str, Range]],
    progress: Progress,
    initializers: Mapping[str, np.ndarray] = NO_INITIALIZERS,
    serialize: Serializer = whole_plan,
) -> tuple[memoryview, str]:
    """一个 ONNX 文件 → 引擎与各层的文本。

    引擎有几十 GB，所以不复制：交出的就是 TensorRT 自己的那块内存，用完即放。

    Args:
        trt: TensorRT 模块。
        flavour: 它是哪种。
        model: ONNX 文件。
        sm: 目标计算能力，先过 :func:`~deepseek_export.engine.flavour.check_arch`。
        profiles: 每个优化配置里各具名维的范围。
        progress: 进度。
        initializers: 代替文件里内容的权重，按引用的 bundle 里按配方生成的那些；引擎建好之前数组不能释放。
        serialize: 建，交出 plan；只测量的（:mod:`perf.workload.engine_memory`）边建边收，不留整个的。

    Raises:
        DsxError: ``DSX-E914`` TensorRT 报错；``DSX-E916`` 插件内部出错。
    """
    logger = logger_for(trt)
    logger.clear()
    registered_creators(trt)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    select_arch(flavour, trt, config, sm)
    # 解析器按两个一字节读 int4；它只借用内存，所以这些数组要活到引擎建好。
    given = {n: packed_int4(a) if a.dtype == ml_dtypes.int4 else a for n, a in initializers.items()}
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    with deferred_interrupts() as interrupted, building_for(sm) as target:
        progress.start(f"TensorRT 解析 {model.name}")
        if not _parse(parser, model, given):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            messages = [f"{e.node_name() or '图'}（{e.node_operator() or '-'}）：{e.desc()}" for e in errors]
            raise _failure(target, model, messages)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # 没有它就不知道引擎有哪些层
        # 执行时不许自己分配显存，否则录不成 CUDA graph；完整的 TensorRT 本来就不会，没有这个标志。
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.progress_monitor = _monitor(
            trt, progress, f"TensorRT 构建 {model.stem}（sm{sm}）", interrupted
        )
        for ranges in profiles.values():
            config.add_optimization_profile(_optimization_profile(builder, network, ranges))
        content = serialize(builder, network, config)
        if content is None or target.failures:
            raise _failure(target, model, logger.errors())
        content = memoryview(content).cast("B")
        # 仍在 building_for 之内：完整的 TensorRT 在这里把引擎读回来，插件随之重建。
        text = layer_information(flavour, trt, logger.messages(), content, logger)
        if not text or target.failures:
            raise _failure(target, model, logger.errors())
    return content, text


def _parse(parser: Any, model: Path, initializers: Mapping[str, np.ndarray]) -> bool:
    """解析；``initializers`` 逐个交给解析器，其余的权重由它自己从文件里读。"""
    if not initializers:
        return parser.parse_from_file(str(model))
    return (
        parser.load_model_proto(model.read_bytes(), str(model))
        and all(
            parser.load_initializer(name, array.ctypes.data, array.nbytes)
            for name, array in initializers.items()
        )
        and parser.parse_model_proto()
    )


def expected_plugins(profile: str, plugins: Mapping[str, str]) -> Mapping[str, str]:
    """一个优化配置里一定要有的插件：解码是全部；prefill 的注意力走原生融合核，走不到的插件可以整条删掉，缓存的写入、索引器、专家与线性层总要经过。"""
    if profile == "decode":
        return plugins
    always = (LATENT_CACHE_UPDATE, INDEX_TOPK, MOE_EXPERTS, QUANTIZED_MOE_EXPERTS, QUANTIZED_LINEAR)
    return {node: op for node, op in plugins.items() if op in {spec.name for spec in always}}


def check_plugins(name: str, layers: Iterable[EngineLayer], plugins: Mapping[str, str]) -> None:
    """每个插件节点都是一个插件层。

    Raises:
        DsxError: ``DSX-E915``。
    """
    missing = missing_plugins(layers, plugins)
    if missing:
        shown = "、".join(missing[:5]) + (f" 等 {len(missing)} 个" if len(missing) > 5 else "")
        raise DsxError(
            "DSX-E915", f"{name} 里没有插件层 {shown}", "这是 dsx 的缺陷：请附上 dsx doctor 的输出报告"
        )


def check_caches(name: str, text: str, graph: GraphEntry, capacity: int) -> None:
    """没有一层把整块缓存抄一遍。

    Raises:
        DsxError: ``DSX-E922``。
    """
    caches = [
        [capacity if size == "T" else int(size) for size in value.shape[1:]]
        for value in graph.inputs
        if "T" in value.shape
    ]
    copies = copied_caches(text, caches)
    if copies:
        what = f"{name} 有 {len(copies)} 层把整块缓存抄一遍，第一层是 {copies[0]}"
        raise DsxError("DSX-E922", what, "这是 dsx 的缺陷：请附上 dsx doctor 的输出报告")


def _optimization_profile(builder: Any, network: Any, ranges: Mapping[str, Range]) -> Any:
    """按输入的具名维填最小、最优、最大。"""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) or "" for axis in range(len(tensor.shape))]
        shapes = [
            tuple(
                ranges[name][which] if size < 0 else size
                for name, size in zip(names, tensor.shape, strict=True)
            )
            for which in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    return profile


def _failure(target: BuildTarget, model: Path, messages: Sequence[str]) -> DsxError:
    """插件里的异常优先：TensorRT 只说「插件出错」。"""
    target.raise_failure(f"{model.name} ")
    text = "；".join(message.strip() for message in messages[:3]) or "没有给出原因"
    return DsxError(
        "DSX-E914", f"{model.name}：{text}", "核对 dsx doctor OUT；原话可在 TensorRT 的文档里检索"
    )


def _monitor(trt: Any, progress: Progress, stage: str, interrupted: Callable[[], bool]) -> Any:
    """TensorRT 的进度 → dsx 的进度：只报最外层阶段的步数；``interrupted`` 之后说一句为什么还没有停。"""

    class Monitor(trt.IProgressMonitor):
        """每个外层阶段重新开始一条进度。"""

        def __init__(self) -> None:
            super().__init__()
            self.outer: str | None = None
            self.told = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if self.outer is None:
                self.outer = phase
                progress.start(stage, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outer:
                progress.advance(1, phase)
            if interrupted() and not self.told:
                self.told = True
                progress.note("收到中断：TensorRT 半路停不下来，建完这一个就退出；再来一次立即退出")
            return True

        def phase_finish(self, phase: str) -> None:
            if phase == self.outer:
                self.outer = None

    return Monitor()


def _link_weights(bundle: Bundle, directory: Path) -> None:
    """引擎旁的 ONNX 引用同一份权重：硬链接，跨文件系统才复制（ONNX 不允许外部数据在目录之外）。"""
    by_recipe = [BY_RECIPE_FILE] if bundle.manifest.weights.mode == "reference" else []
    for name in [*bundle.manifest.weights.files, *by_recipe]:
        source, target = bundle.path / name, directory / name
        with disk_errors(directory):
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source, target)
