"""CUDA 驱动接口里会话用得到的几样：上下文、流、设备内存、拷贝、CUDA graph。"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_export.engine.flavour import device_sm
from deepseek_export.errors import DsxError

#: 元素不多于这么多的输入，送之前先看与上次送的是不是一样。
_COMPARED = 1024


def require_gpu() -> int:
    """当前 GPU 的计算能力。

    Raises:
        DsxError: ``DSX-E918``，没有 GPU。
    """
    sm = device_sm()
    if sm is None:
        raise DsxError(
            "DSX-E918",
            "--backend trt 要有 NVIDIA GPU 与驱动，这里没有",
            "换到有 GPU 的机器；在这里用 --backend ort（缺省），bfloat16 的先用 --dtype float16 再导出一份",
        )
    return sm


def driver_version() -> tuple[int, int]:
    """驱动支持到哪一版 CUDA：主、次版本号；先过 :func:`require_gpu`。"""
    from cuda.bindings import driver

    _, number = driver.cuDriverGetVersion()  # 13040 是 13.4；没有 GPU 也答得出
    return number // 1000, number % 1000 // 10


class Cuda:
    """一个设备上的主上下文与一条流，任何线程都能用：每次调用驱动之前把上下文设为这个线程当前的。"""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._check(driver.cuInit, driver.cuInit(0))
        self._context = self._check(driver.cuDevicePrimaryCtxRetain, driver.cuDevicePrimaryCtxRetain(0))
        self._stream = self._call(driver.cuStreamCreate, 1)  # 1 = CU_STREAM_NON_BLOCKING

    def make_current(self) -> None:
        """把上下文设为这个线程当前的；不经过本类而要用驱动的（TensorRT 与其中的插件）先调它。

        驱动的当前上下文按线程记，服务里加载与执行往往不在同一个线程，析构更可以在任何一个。
        """
        self._check(self._driver.cuCtxSetCurrent, self._driver.cuCtxSetCurrent(self._context))

    @property
    def stream(self) -> int:
        """流的句柄。"""
        return int(self._stream)

    def allocate(self, nbytes: int) -> int:
        """设备内存的地址；至少一个字节，TensorRT 不接受空指针。"""
        return int(self._call(self._driver.cuMemAlloc, max(nbytes, 1)))

    def free(self, address: int) -> None:
        """归还 :meth:`allocate` 的内存。"""
        self._call(self._driver.cuMemFree, address)

    def allocate_host(self, nbytes: int) -> int:
        """锁页的主机内存的地址；拷贝引擎直接读写它，不经过驱动自己的一块中转。"""
        return int(self._call(self._driver.cuMemAllocHost, max(nbytes, 1)))

    def free_host(self, address: int) -> None:
        """归还 :meth:`allocate_host` 的内存。"""
        self._call(self._driver.cuMemFreeHost, address)

    def clear(self, address: int, nbytes: int) -> None:
        """清零。"""
        self._call(self._driver.cuMemsetD8Async, address, 0, nbytes, self._stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """主机 → 设备；``array`` 要活到 :meth:`synchronize`。"""
        if array.nbytes:
            self._call(self._driver.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """设备 → 主机；内容在 :meth:`synchronize` 之后可读。"""
        if array.nbytes:
            self._call(self._driver.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream)

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """设备 → 设备，在流上。"""
        if nbytes:
            self._call(self._driver.cuMemcpyDtoDAsync, target, source, nbytes, self._stream)

    def synchronize(self) -> None:
        """等流上的事做完。"""
        self._call(self._driver.cuStreamSynchronize, self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """把 ``work`` 在流上排的事录成 CUDA graph，不执行；``work`` 不能分配、不能同步。

        Raises:
            DsxError: ``DSX-E914``，录不下来；``work`` 自己的错误原样抛出。流回到平常的状态。
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(self._driver.cuStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            # 录制已经作废，这个返回值只会这么说，盖过真正的原因。
            self._driver.cuStreamEndCapture(self._stream)
            raise
        graph = self._call(self._driver.cuStreamEndCapture, self._stream)
        try:
            return self._call(self._driver.cuGraphInstantiate, graph, 0)
        finally:
            self._call(self._driver.cuGraphDestroy, graph)

    def launch(self, graph: Any) -> None:
        """在流上重放 :meth:`capture` 录下的 graph。"""
        self._call(self._driver.cuGraphLaunch, graph, self._stream)

    def discard(self, graph: Any) -> None:
        """归还 :meth:`capture` 录下的 graph。"""
        self._call(self._driver.cuGraphExecDestroy, graph)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.make_current()
        return self._check(function, function(*arguments))

    def _check(self, function: Callable[..., Any], result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            full = status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            todo = (
                "显存不足：减小批大小，或用更小的 T 重建引擎" if full else "见驱动的日志（dmesg、nvidia-smi）"
            )
            raise DsxError("DSX-E914", f"{function.__name__} 返回 {status.name}", todo)
        return values[0] if values else None


class _Pinned:
    """锁页的主机内存，一块；由它得来的数组握着它，最后一个放手时归还。"""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._cuda, self._address = cuda, cuda.allocate_host(nbytes)
        data = (self._address, False)
        self.__array_interface__ = {"data": data, "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._cuda.free_host(self._address)


class Workspace:
    """执行上下文的中间值用的一块显存；只换大，不换小。"""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._address, self._nbytes = cuda, 0, 0

    def grow(self, nbytes: int) -> None:
        """至少 ``nbytes`` 字节；换的时候先等流上的事做完，内容不留。"""
        if nbytes <= self._nbytes and self._address:
            return
        if self._address:
            self._cuda.synchronize()
            self._cuda.free(self._address)
            self._address = self._nbytes = 0
        self._address, self._nbytes = self._cuda.allocate(nbytes), nbytes

    def give(self, context: Any) -> None:
        """交给一个执行上下文。"""
        context.set_device_memory(self._address, self._nbytes)

    def __del__(self) -> None:
        if self._address:
            self._cuda.free(self._address)


class Buffer:
    """一个输入或输出：设备上一块，主机上（锁页）要用才有一块，都按见过的最大形状分配。"""

    def __init__(self, cuda: Cuda, dtype: np.dtype) -> None:
        self._cuda, self._dtype = cuda, dtype
        self._flat = np.empty(0, dtype)
        self._shape: tuple[int, ...] = (0,)
        self._size = 0  # 设备上那块放得下几个
        self._sent = False
        self.address = 0

    @property
    def array(self) -> np.ndarray:
        """主机上的这一块，现在的形状。"""
        count = math.prod(self._shape)
        if count > self._flat.size:
            self._flat = np.asarray(_Pinned(self._cuda, count * self._dtype.itemsize)).view(self._dtype)
        return self._flat[:count].reshape(self._shape)

    def send(self, array: np.ndarray) -> None:
        """把 ``array`` 送到设备，形状先由 :meth:`reshape` 定好；小的、与上次送的一样的不再送：解码一步多半只有 token 与长度变了。"""
        mine = self.array
        if self._sent and array.size <= _COMPARED and np.array_equal(mine, array):
            return
        np.copyto(mine, array)
        self._cuda.upload(self.address, mine)
        self._sent = True

    def fetch(self) -> None:
        """把设备上的取回 :attr:`array`；内容在 :meth:`Cuda.synchronize` 之后可读。"""
        self._cuda.download(self.array, self.address)

    def reshape(self, shape: tuple[int, ...]) -> None:
        """换成 ``shape``；设备上装不下才重新分配。"""
        self._sent = self._sent and shape == self._shape
        self._shape, size = shape, math.prod(shape)
        if size > self._size or not self.address:
            if self.address:
                self._cuda.free(self.address)
            self.address, self._size = self._cuda.allocate(size * self._dtype.itemsize), size

    def __del__(self) -> None:
        if self.address:
            self._cuda.free(self.address)
