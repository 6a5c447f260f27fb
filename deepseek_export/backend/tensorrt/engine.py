"""引擎目录里的引擎（``.plan`` 文件）：按 GPU 找到、核对、反序列化、执行。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_export.backend.contract import PORT_DIMS, GraphContract, Port
from deepseek_export.backend.tensorrt.cuda import Cuda, Workspace, driver_version, require_gpu
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import sha256_file
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.engine.flavour import FLAVOURS, Flavour, load
from deepseek_export.engine.logger import logger_for
from deepseek_export.engine.plugins import BuildTarget, building_for, registered_creators
from deepseek_export.engine.record import ENGINES, EngineEntry, EngineRecord
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.errors import DsxError
from deepseek_export.records import BEST_ID, BEST_LOGIT


def find_engine(bundle: Bundle, sm: int) -> tuple[Path, EngineRecord]:
    """bundle 里为 ``sm`` 建好、在这里能用的引擎目录。

    Raises:
        DsxError: ``DSX-E920``，没有建过；``DSX-E917``，有而不符。
    """
    digest = sha256_file(bundle.path / "manifest.json")
    refusals = []
    for flavour in FLAVOURS.values():
        directory = bundle.path / ENGINES / f"{flavour.name}-sm{sm}"
        if not directory.is_dir():
            continue
        try:
            record = EngineRecord.read(directory)
            record.check(directory, flavour.version(), sm, digest)
            return directory, record
        except DsxError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    raise DsxError(
        "DSX-E920", f"{bundle.path} 没有 sm{sm} 的引擎", f"先建：dsx build {bundle.path} --arch sm{sm}"
    )


@dataclass(frozen=True)
class Call:
    """一次执行的全部外部条件；两次相等，就是对同一批内存做同样形状的事。

    Attributes:
        profile: 优化配置名。
        shapes: 每个输入的形状。
        addresses: 每个输入输出的显存地址。
    """

    profile: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    addresses: tuple[tuple[str, int], ...]


class LoadedEngine:
    """一个反序列化好的引擎：每个优化配置一个执行上下文，共用一块中间值的显存（都在一条流上，不会同时执行）。

    那一块按这一次的形状要，不够再换大的：prefill 的中间值随看几行缓存变，配置的上限却是整个容量。录进 CUDA graph 的上下文另用一块，按配置的上限要，从不换。

    Args:
        flavour: 用哪种 TensorRT。
        sm: 当前 GPU。
        content: 引擎的内容。
        profiles: 优化配置的名字，次序即编号。
        what: 它叫什么，写进错误里。

    Attributes:
        cuda: 所在的设备与流。
        engine: TensorRT 的引擎。
        contexts: 优化配置名 → 执行上下文。

    Raises:
        DsxError: ``DSX-E914`` TensorRT 拒绝加载；``DSX-E916`` 插件出错。
    """

    def __init__(
        self, flavour: Flavour, sm: int, content: bytes | memoryview, profiles: Iterable[str], what: str
    ) -> None:
        self.cuda, self._sm, self._what = Cuda(), sm, what
        self._trt, self._profiles = load(flavour), list(profiles)
        self._logger = logger_for(self._trt)
        registered_creators(self._trt)
        self._workspace, self._fixed_workspace = Workspace(self.cuda), Workspace(self.cuda)
        self.contexts: dict[str, Any] = {}
        self._fixed: list[Any] = []
        with building_for(sm) as target:
            self._runtime = self._trt.Runtime(self._logger)
            self.engine = self._runtime.deserialize_cuda_engine(content)
            if self.engine is None:
                raise self._failure(target, f"加载 {what}")
        for name in self._profiles:
            self.contexts[name] = self.create_context(name)

    def create_context(self, profile: str, fixed_kernels: bool = False) -> Any:
        """``profile`` 的一个新的执行上下文。

        Args:
            profile: 优化配置名。
            fixed_kernels: 要录成 CUDA graph 的：为每组形状当场编译好专用的 kernel（TensorRT-RTX 缺省先用通用的、编译好了再换，录下的就过时了），中间值的显存
                从此不换。

        Raises:
            DsxError: ``DSX-E914`` / ``DSX-E916``。
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        specialization = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        config: Any = strategy
        if fixed_kernels and specialization is not None:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self.cuda.make_current()
        with building_for(self._sm) as target:
            context = self.engine.create_execution_context(config)
            index = self._profiles.index(profile)
            if (
                context is None
                or target.failures
                or not context.set_optimization_profile_async(index, self.cuda.stream)
            ):
                raise self._failure(target, f"{self._what} 的配置 {profile}")
        if fixed_kernels:
            # 一种配置的专用上下文共用一块；它们只由解码的配置来，要的一样多。
            self._fixed_workspace.grow(self.engine.get_device_memory_size_for_profile_v2(index))
            self._fixed_workspace.give(context)
            self._fixed.append(context)
        return context

    def run(self, context: Any, call: Call) -> None:
        """按 ``call`` 设好 ``context``，在流上执行一次，不等它做完。

        Raises:
            DsxError: ``DSX-E914`` / ``DSX-E916``。
        """
        for settle, values in (
            (context.set_input_shape, call.shapes),
            (context.set_tensor_address, call.addresses),
        ):
            for name, value in values:
                if not settle(name, value):
                    raise self._failure(None, f"设置 {call.profile} 的 {name} = {value}")
        self.ready(context)
        self.execute(context, call.profile)

    def ready(self, context: Any) -> None:
        """``context`` 的形状设好了：给它这一次要的中间值的显存。"""
        if not any(context is one for one in self._fixed):
            self._workspace.grow(context.update_device_memory_size_for_shapes())
            self._workspace.give(context)

    def execute(self, context: Any, name: str) -> None:
        """在流上执行一次，不等它做完。"""
        self.cuda.make_current()
        with building_for(self._sm) as target:
            if not context.execute_async_v3(self.cuda.stream):
                raise self._failure(target, f"执行 {name}")

    def capture(self, context: Any, name: str) -> Any:
        """把 ``context`` 的一次执行录成 CUDA graph；它此前刚以同样的形状与地址执行过。

        Raises:
            DsxError: ``DSX-E914`` / ``DSX-E916``，录不了。
        """
        # 完整的 TensorRT 没有这个询问，录不了时直接报错。
        capturable = getattr(context, "is_stream_capturable", lambda stream: True)
        self.cuda.synchronize()
        if not capturable(self.cuda.stream):
            todo = "用这个版本的 dsx build 重建：从前建的引擎会在执行时分配显存"
            raise DsxError("DSX-E914", f"TensorRT 说 {name} 不能录成 CUDA graph", todo)
        return self.cuda.capture(lambda: self.execute(context, name))

    def __del__(self) -> None:
        if getattr(self, "contexts", None):
            self.cuda.make_current()
            self.contexts.clear()

    def _failure(self, target: BuildTarget | None, what: str) -> DsxError:
        if target is not None:
            target.raise_failure(f"{what}时 ")
        text = "；".join(self._logger.errors()[-3:]) or "没有给出原因"
        return DsxError("DSX-E914", f"{what}：{text}", "用 dsx build 重建；仍不行请附上这段文字报告")


@dataclass(frozen=True)
class BundleEngine:
    """``dsx build`` 为 bundle 的一张图建的引擎。

    Attributes:
        loaded: 反序列化好的引擎。
        shapes: 建的时候给的形状。
        entry: ``engine.json`` 里的说明。
        contract: 图的约定，来自 manifest。
    """

    loaded: LoadedEngine
    shapes: ProfileShapes
    entry: EngineEntry
    contract: GraphContract


def open_engine(bundle: Bundle, path: Path) -> BundleEngine:
    """加载一个引擎。

    Args:
        bundle: 引擎所属的 bundle。
        path: 引擎目录里的 ``.plan`` 文件。

    Raises:
        DsxError: ``DSX-E918`` 没有 GPU；``DSX-E917`` 引擎与这里不符；``DSX-E923`` 驱动太旧；其余见 :class:`LoadedEngine`。
    """
    sm = require_gpu()
    record = EngineRecord.read(path.parent)
    flavour = FLAVOURS[record.flavour]
    record.check(path.parent, flavour.version(), sm, sha256_file(bundle.path / "manifest.json"))
    record.check_driver(path.parent, driver_version())
    entry = record.plans[path.name]
    graph = next(graph for graph in bundle.manifest.graphs if graph.file == entry.graph)
    loaded = LoadedEngine(flavour, sm, record.read_engine(path), entry.profiles, str(path))
    return BundleEngine(loaded, record.shapes, entry, graph_contract(graph, entry.best))


def graph_contract(graph: GraphEntry, best: bool) -> GraphContract:
    """一个引擎的约定：manifest 里那张图的，``best`` 的另有引擎自己选出的 token。

    Raises:
        DsxError: ``DSX-E508``。
    """
    inputs, outputs = (
        [Port(value.name, value.dtype, tuple(value.shape)) for value in values]
        for values in (graph.inputs, graph.outputs)
    )
    if best:
        added = ((BEST_ID, "int64"), (BEST_LOGIT, "float32"))
        outputs += [Port(name, dtype, PORT_DIMS[name]) for name, dtype in added]
    return GraphContract.of(inputs, outputs)


def select_profile(entry: EngineEntry, sizes: Mapping[str, int]) -> str:
    """放得下这组尺寸的优化配置。

    Raises:
        DsxError: ``DSX-E921``，哪个配置都放不下。
    """
    for name, ranges in entry.profiles.items():
        if all(ranges[dim][0] <= size <= ranges[dim][2] for dim, size in sizes.items()):
            return name
    shown = "，".join(f"{dim}={size}" for dim, size in sizes.items())
    limits = "；".join(
        f"{name} "
        + " ".join(f"{dim}={low}..{high}" for dim, (low, _, high) in ranges.items() if dim in sizes)
        for name, ranges in entry.profiles.items()
    )
    batch = sizes.get("B")
    fits = batch is None or any(r["B"][0] <= batch <= r["B"][2] for r in entry.profiles.values())
    # S、L、K 的上限来自插件核与草稿验证，重建未必放得宽。
    todo = "分成几次较短的调用" if fits else "改变批大小，或用 dsx build --profile-shapes 重建"
    raise DsxError("DSX-E921", f"{shown} 不在引擎的优化配置里（{limits}）", todo)


def max_logits_rows(entry: EngineEntry, verifies_drafts: bool) -> int:
    """一次调用至多能要几行 logits，要的是全部新 token 的；带草稿验证的，L 行要 L-1 个草稿。"""
    return max(
        min(ranges["S"][2], ranges["L"][2], ranges["K"][2] + 1 if verifies_drafts else ranges["L"][2])
        for ranges in entry.profiles.values()
    )
