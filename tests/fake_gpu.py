"""没有 GPU 时跑 TensorRT 会话的替身。替的是 GPU、驱动与 TensorRT 的运行时，不是被测的代码。

- 驱动：显存是主机内存，流上的事立即做完；录制期间只记不做，分配、同步、拷贝都是错误。当前上下文按线程记，没有设过的线程用不了。
- 引擎：plan 的内容是一个编号，指向下沉后的 ONNX，由 ONNX Runtime 在「显存」的那些地址上读写；同一个缓存的输入与输出必须是同一块。
- 录制的规矩照 NVIDIA 的说明断言：录之前刚以同样的形状执行过，kernel 不会再换，录过的上下文没有再改动。

它证明地址、形状、别名、配置的选择与录制的次序；kernel 的数值、真的 TensorRT 接受这些调用，要在 GPU 上证明。
"""

from __future__ import annotations

import ctypes
import enum
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from deepseek_export.backend.contract import Port
from deepseek_export.backend.tensorrt import engine as loading
from deepseek_export.bundle import Bundle
from deepseek_export.dtypes import DTYPES
from deepseek_export.engine import build
from deepseek_export.engine.flavour import FLAVOURS, Flavour
from deepseek_export.engine.graph import KEY_SPAN, KEY_SPAN_DIMS
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.records import BEST_ID, BEST_LOGIT

SM = 89
#: 引擎选好的 token 与它的 logit。
BEST = ((BEST_ID, "int64"), (BEST_LOGIT, "float32"))
#: 一行缓存要多少中间值；录成 CUDA graph 的至多几行（解码的 P 是 1）。
_WORKSPACE, _MOST_ROWS = 4096, 16


class Status(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class FakeDriver:
    """``cuda.bindings.driver`` 里用到的几个函数。

    Attributes:
        live: 没有归还的显存，地址 → 内存。
        pinned: 没有归还的锁页内存，地址 → 内存。
        graphs: 没有归还的 CUDA graph。
        version: 支持到哪一版 CUDA，13000 是 13.0。
        counts: ``plain`` 照常执行、``capture`` 录制、``launch`` 重放的次数；``upload``、``download`` 拷贝的次数，``fetched`` 取回的字节数。
    """

    CUresult = Status
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=SM // 10,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=SM % 10,
    )

    def __init__(self) -> None:
        self.live: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.graphs: list[Any] = []
        self.counts: Counter[str] = Counter()
        self.recording: list[Any] | None = None
        self.invalidated = False
        self._thread = threading.local()
        self.version = 13000

    @property
    def entered(self) -> bool:
        """这个线程有没有当前上下文。"""
        return getattr(self._thread, "context", None) is not None

    def _in_context(self, *values: Any) -> tuple:
        if not self.entered:
            return (Status.CUDA_ERROR_INVALID_CONTEXT, *(None for _ in values))
        return (Status.CUDA_SUCCESS, *values)

    def _outside_capture(self, *values: Any) -> tuple:
        if self.recording is not None:
            self.invalidated = True
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, *(None for _ in values))
        return self._in_context(*values)

    def cuInit(self, flags):
        return (Status.CUDA_SUCCESS,)

    def cuDriverGetVersion(self):
        return Status.CUDA_SUCCESS, self.version

    def cuDeviceGetAttribute(self, number, device):
        return Status.CUDA_SUCCESS, number

    def cuDevicePrimaryCtxRetain(self, device):
        return Status.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context):
        self._thread.context = context
        return (Status.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags):
        return self._in_context(7)

    def cuStreamSynchronize(self, stream):
        return self._outside_capture()

    def cuMemAlloc(self, nbytes):
        memory = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)
        address = ctypes.addressof(memory)
        result = self._outside_capture(address)
        if result[0] is Status.CUDA_SUCCESS:
            self.live[address] = memory
        return result

    def cuMemFree(self, address):
        result = self._outside_capture()
        if result[0] is Status.CUDA_SUCCESS:
            self.live.pop(address)
        return result

    def cuMemAllocHost(self, nbytes):
        memory = ctypes.create_string_buffer(nbytes)
        self.pinned[ctypes.addressof(memory)] = memory
        return self._outside_capture(ctypes.addressof(memory))

    def cuMemFreeHost(self, address):
        self.pinned.pop(address)
        return self._outside_capture()

    def cuMemsetD8Async(self, address, value, nbytes, stream):
        ctypes.memset(self.memory(address, nbytes), value, nbytes)
        return self._outside_capture()

    def cuMemcpyHtoDAsync(self, address, host, nbytes, stream):
        ctypes.memmove(self.memory(address, nbytes), host, nbytes)
        self.counts["upload"] += 1
        return self._outside_capture()

    def cuMemcpyDtoHAsync(self, host, address, nbytes, stream):
        ctypes.memmove(host, self.memory(address, nbytes), nbytes)
        self.counts["download"] += 1
        self.counts["fetched"] += nbytes
        return self._outside_capture()

    def cuMemcpyDtoDAsync(self, target, source, nbytes, stream):
        ctypes.memmove(self.memory(target, nbytes), self.memory(source, nbytes), nbytes)
        return self._outside_capture()

    def cuStreamBeginCapture(self, stream, mode):
        self.recording, self.invalidated = [], False
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        if self.invalidated:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return Status.CUDA_SUCCESS, recorded

    def cuGraphInstantiate(self, graph, flags):
        self.graphs.append(graph)
        self.counts["capture"] += 1
        return Status.CUDA_SUCCESS, graph

    def cuGraphDestroy(self, graph):
        return (Status.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, graph):
        result = self._in_context()
        if result[0] is Status.CUDA_SUCCESS:
            self.graphs.remove(graph)
        return result

    def cuGraphLaunch(self, graph, stream):
        self.counts["launch"] += 1
        for work in graph:
            work()
        return (Status.CUDA_SUCCESS,)

    def memory(self, address: int, nbytes: int) -> int:
        """核对这一段在分配过的显存之内。"""
        assert any(
            start <= address and address + nbytes <= start + len(block) for start, block in self.live.items()
        ), "越过了分配的显存"
        return address


class FakeContext:
    """``IExecutionContext``。"""

    def __init__(self, engine: FakeEngine, fixed_kernels: bool) -> None:
        self._engine, self._fixed_kernels = engine, fixed_kernels
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._executed: dict[str, tuple[int, ...]] | None = None
        self._workspace: tuple[int, int] | None = None
        self._version = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._workspace = (address, nbytes)

    def update_device_memory_size_for_shapes(self) -> int:
        return self._engine.workspace(self._shapes)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._version += 1
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._version += 1
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.gpu.capturable

    def execute_async_v3(self, stream: int) -> bool:
        driver, shapes, addresses = self._engine.gpu.driver, dict(self._shapes), dict(self._addresses)
        assert driver.entered, "这个线程没有当前上下文"
        assert self._workspace is not None
        assert self._workspace[1] >= self._engine.workspace(shapes), "中间值的显存不够"
        driver.memory(*self._workspace)
        if driver.recording is None:
            driver.counts["plain"] += 1
            self._executed = shapes
            self._engine.execute(shapes, addresses)
            return True
        assert self._executed == shapes, "换了形状之后要先照常执行一次再录"
        assert self._fixed_kernels, "录下的 kernel 之后会被换掉"
        if self._engine.gpu.allocates_while_capturing:
            return driver.cuMemAlloc(1)[0] is Status.CUDA_SUCCESS
        version = self._version

        def replay() -> None:
            assert self._version == version, "录过的上下文又改动过，重放没有定义"
            self._engine.execute(shapes, addresses)

        driver.recording.append(replay)
        return True


class FakeEngine:
    """``ICudaEngine``：在给定的地址上运行一个 ONNX。"""

    def __init__(self, gpu: FakeGpu, model: Path, nodes: dict[str, Port]) -> None:
        self.gpu, self._nodes = gpu, nodes
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    @staticmethod
    def workspace(shapes: dict[str, tuple[int, ...]]) -> int:
        """中间值随看几行缓存变。"""
        return _WORKSPACE * int(np.prod(shapes.get(KEY_SPAN, (1,))))

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        assert index == 0, "只有解码的配置要录"
        return _WORKSPACE * _MOST_ROWS

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="lazy", strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(
            config, "strategy", strategy
        )
        return config

    def create_execution_context(self, config: Any) -> FakeContext | None:
        assert getattr(config, "strategy", config) == "user"
        assert self.gpu.driver.entered, "这个线程没有当前上下文：插件在这里装载机器码"
        fixed_kernels = getattr(config, "dynamic_shapes_kernel_specialization_strategy", "") == "eager"
        return None if fixed_kernels and self.gpu.out_of_memory else FakeContext(self, fixed_kernels)

    def execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """读输入、运行、写输出；每个端口都要有地址。"""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        assert set(shapes) == {node.name for node in inputs}
        assert set(addresses) == {node.name for node in (*inputs, *outputs)} == set(self._nodes)
        kinds = {dtype.onnx_type: dtype.numpy for dtype in DTYPES.values()}
        feeds = {}
        for node in inputs:
            fixed = [size for size in node.shape if isinstance(size, int)]
            assert [
                s for s, d in zip(shapes[node.name], node.shape, strict=True) if isinstance(d, int)
            ] == fixed
            view = self._view(node.name, shapes[node.name], addresses)
            feeds[node.name] = view.astype(kinds[node.type])
        names = [node.name for node in outputs]
        for name, value in zip(names, self._session.run(names, feeds), strict=True):
            cache, _, number = name.partition("_out.")
            assert not number or addresses[name] == addresses[f"{cache}.{number}"], "缓存要原地更新"
            self._view(name, value.shape, addresses)[...] = value

    def _view(self, name: str, shape: tuple[int, ...], addresses: dict[str, int]) -> np.ndarray:
        dtype = self._nodes[name].numpy
        nbytes = int(np.prod(shape)) * dtype.itemsize
        address = self.gpu.driver.memory(addresses[name], nbytes)
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype).reshape(shape)


class FakeTensorRT:
    """``tensorrt_rtx`` 这个模块。"""

    __version__ = "fake"
    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    Runtime: Any


class FakeGpu:
    """装上替身。

    Args:
        patch: pytest 的 monkeypatch，撤销由它管。

    Attributes:
        capturable: TensorRT 说能不能录。
        allocates_while_capturing: 录制时引擎要分配显存（于是录不成）。
        out_of_memory: 建不出专用的上下文。
    """

    def __init__(self, patch: Any) -> None:
        self.driver = FakeDriver()
        self.capturable, self.allocates_while_capturing, self.out_of_memory = True, False, False
        self._engines: dict[bytes, tuple[Path, dict[str, Port]]] = {}
        trt = FakeTensorRT()
        trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=self._deserialize)
        patch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=self.driver))
        patch.setattr(Flavour, "version", lambda flavour: trt.__version__)
        for module in (build, loading):
            patch.setattr(module, "load", lambda flavour: trt)
            patch.setattr(module, "registered_creators", lambda trt: {})
        patch.setattr(
            build, "build_engine_bytes", lambda trt, flavour, model, *rest: (str(model).encode(), "")
        )
        for check in ("check_arch", "check_plugins"):
            patch.setattr(build, check, lambda *_: None)

    def build(self, bundle: Bundle, shapes: str = "T=128", run: Path | None = None) -> Path:
        """``dsx build`` 一遍，只有 TensorRT 的编译换成记下 ONNX 的位置。

        Args:
            bundle: bundle。
            shapes: ``--profile-shapes``。
            run: 实际运行这个引擎目录里的 ONNX（ONNX Runtime 不会 bfloat16，用 float16 的那一份）。

        Returns:
            引擎目录。
        """
        limit = bundle.manifest.model.max_position_embeddings
        made = build.build_engine(bundle, SM, FLAVOURS["rtx"], ProfileShapes.parse(shapes, limit))
        for name, entry in made.record.plans.items():
            graph = next(graph for graph in bundle.manifest.graphs if graph.file == entry.graph)
            nodes = {
                value.name: Port(value.name, value.dtype, tuple(value.shape))
                for value in (*graph.inputs, *graph.outputs)
            }
            if "P" in entry.profiles["decode"]:
                nodes[KEY_SPAN] = Port(KEY_SPAN, "int8", KEY_SPAN_DIMS)
            if entry.best:
                nodes |= {name: Port(name, dtype, ("B", "L", 1)) for name, dtype in BEST}
            plan = (made.path / name).read_bytes()
            self._engines[plan] = ((run or made.path) / entry.graph, nodes)
        return made.path

    def _deserialize(self, plan: bytes) -> FakeEngine:
        return FakeEngine(self, *self._engines[plan])
