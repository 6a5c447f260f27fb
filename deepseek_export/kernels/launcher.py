"""在 CUDA 流上启动一个 :data:`~deepseek_export.kernels.program.Program`；需要 ``cuda-bindings`` 与 NVIDIA 驱动。

装载在构造时完成；:meth:`Launcher.enqueue` 只启动 kernel，不分配、不同步，所以可以录进 CUDA graph。
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from deepseek_export.errors import DsxError
from deepseek_export.kernels.program import POINTER_ALIGNMENT, CompiledKernel, Launch, Program

Shapes = tuple[tuple[int, ...], ...]

#: (CUDA 上下文, kernel) → 装载好的函数：一个模型的几十层是同样的程序，机器码只装载一次。
_LOADED: dict[tuple[Any, CompiledKernel], Any] = {}


class Launcher:
    """装载好的程序。

    Args:
        program: 要启动的程序；它的 SM 必须是当前设备的。

    Raises:
        DsxError: ``DSX-E905``，没有 cuda-bindings、没有驱动，或当前线程没有 CUDA 上下文。
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._driver = _load_driver()
        (context,) = self._check(self._driver.cuCtxGetCurrent())
        (device,) = self._check(self._driver.cuCtxGetDevice())
        self._functions = {kernel: self._load(context, device, kernel) for kernel in program.kernels}
        multiprocessors = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        (sms,) = self._check(self._driver.cuDeviceGetAttribute(multiprocessors, device))

        @functools.lru_cache(maxsize=256)  # 解码的每一步形状都相同
        def bind(shapes: Shapes) -> list[Launch[CompiledKernel, int]]:
            return program.bind(shapes, sms)

        self._bind = bind

    def enqueue(
        self, shapes: Shapes, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """依次启动；参数除 ``shapes`` 外都是地址。

        Args:
            shapes: 各输入的形状。
            inputs, outputs: 各张量的设备地址，16 字节对齐。
            workspace: 至少 ``program.workspace(shapes)`` 字节，256 字节对齐；不需要时可为 0。
            stream: ``CUstream``。

        Raises:
            RuntimeError: 有地址没有对齐，就地改写的输出与输入不是同一块，或驱动报错。
        """
        self._check_aligned("输入", inputs)
        self._check_aligned("输出", outputs)
        self._check_aligned("workspace", [workspace])
        check_aliases(self.program, inputs, outputs)
        for launch in self._bind(shapes):
            kernel = launch.kernel
            self._check(
                self._driver.cuLaunchKernel(
                    self._functions[kernel],
                    *launch.grid,
                    kernel.threads,
                    1,
                    1,
                    kernel.shared,
                    stream,
                    pack_arguments(launch, inputs, outputs, workspace),
                    0,
                )
            )

    def _check_aligned(self, what: str, addresses: Sequence[int]) -> None:
        for index, address in enumerate(addresses):
            if address % POINTER_ALIGNMENT:
                raise RuntimeError(
                    f"{self.program.op} 的{what} {index} 在 {address:#x}，没有按 {POINTER_ALIGNMENT} 字节对齐"
                )

    def _load(self, context: Any, device: Any, kernel: CompiledKernel) -> Any:
        if (context, kernel) not in _LOADED:
            driver = self._driver
            (library,) = self._check(driver.cuLibraryLoadData(kernel.cubin, [], [], 0, [], [], 0))
            (handle,) = self._check(driver.cuLibraryGetKernel(library, kernel.entry.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(driver.cuKernelSetAttribute(attribute, kernel.shared, handle, device))
            (_LOADED[context, kernel],) = self._check(driver.cuKernelGetFunction(handle))
        return _LOADED[context, kernel]

    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self.program.op}（sm{self.program.sm}）：CUDA 驱动报告 {status.name}")
        return tuple(values)


def check_aliases(program: Program, inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """就地改写的输出就是那个输入的地址：不是的话，没有改写的行在输出里是别的内容。

    Raises:
        RuntimeError: 有一个不是。
    """
    for output, given in program.aliases:
        if outputs[output] != inputs[given]:
            raise RuntimeError(
                f"{program.op} 的输出 {output} 在 {outputs[output]:#x}，应与输入 {given} 同在 {inputs[given]:#x}"
            )


def pack_arguments(
    launch: Launch[CompiledKernel, int], inputs: Sequence[int], outputs: Sequence[int], workspace: int
) -> tuple[tuple[int | float | None, ...], tuple[Any, ...]]:
    """``cuLaunchKernel`` 的 ``kernelParams``：值与 C 类型，末尾补上 scratch 的空指针。"""
    values: list[int | float | None] = []
    types: list[Any] = []
    for kind, value in launch.arguments:
        match kind:
            case "int32":
                values.append(value)
                types.append(ctypes.c_int32)
            case "float32":
                values.append(value)
                types.append(ctypes.c_float)
            case "workspace":
                values.append(workspace + int(value))
                types.append(ctypes.c_void_p)
            case _:
                values.append((inputs if kind == "input" else outputs)[int(value)])
                types.append(ctypes.c_void_p)
    scratch = launch.kernel.scratch
    return (*values, *[0] * scratch), (*types, *[ctypes.c_void_p] * scratch)


def _load_driver() -> Any:
    todo = "在装有 NVIDIA 驱动的机器上运行，并 pip install -U 'deepseek-export[kernels]'"
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
    except (ImportError, RuntimeError) as error:
        # 没有驱动时 cuda-bindings 抛 RuntimeError 的子类。
        raise DsxError("DSX-E905", str(error), todo) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DsxError("DSX-E905", f"cuInit 返回 {status.name}", todo)
    return driver
