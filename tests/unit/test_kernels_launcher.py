"""kernels/launcher.py：参数怎样打包、怎样调用驱动。真正的启动由 python -m perf.gpu.accept 在有 GPU 的机器上核对。"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_export.engine.flavour import FLAVOURS, load
from deepseek_export.engine.plugins import plugin_class
from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.launcher import Launcher, pack_arguments
from deepseek_export.kernels.program import (
    SM_COUNT,
    Argument,
    CompiledKernel,
    Launch,
    Program,
    Tensor,
    Variant,
)
from deepseek_export.ops.table import LATENT_ATTENTION

pytestmark = pytest.mark.unit

N, ONE = symbol("N"), Expression.of(1)
FIRST = CompiledKernel("first", b"\x7fELF-1", 128, 98304, 2)
SECOND = CompiledKernel("second", b"\x7fELF-2", 64, 0, 0)
PROGRAM = Program(
    "Toy",
    90,
    (Tensor("float16", ("N", "8")),),
    (Tensor("float16", ("N", "8")),),
    (
        Variant(
            ONE,
            N * 256,
            (
                Launch(
                    FIRST,
                    (N.ceil(2), ONE, ONE),
                    (
                        Argument("input", 0),
                        Argument("workspace", N * 64),
                        Argument("float32", 0.125),
                        Argument("int32", N),
                    ),
                ),
                Launch(
                    SECOND, (N, symbol(SM_COUNT), ONE), (Argument("workspace", N * 64), Argument("output", 0))
                ),
            ),
        ),
    ),
)


class Recorder:
    """代替 cuda-bindings 的 ``driver``，记录调用；状态总是 ``status``，上下文是它自己（装载过的按上下文记）。"""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max-shared")
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="sm-count")

    def __init__(self):
        self.calls, self.status = [], self.CUresult.CUDA_SUCCESS

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            if name in ("cuInit", "cuLaunchKernel"):
                return (self.status,)
            if name == "cuDeviceGetAttribute":
                return self.status, 3
            return self.status, self if name == "cuCtxGetCurrent" else (name, *arguments)

        return call


@pytest.fixture
def driver(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=recorder))
    return recorder


def test_pack_arguments():
    """指针、workspace 偏移、标量各是什么 C 类型；末尾补 scratch 的空指针。"""
    first, second = PROGRAM.bind([(4, 8)], 3)
    assert pack_arguments(first, [0x1000], [0x2000], 0x3000) == (
        (0x1000, 0x3000 + 256, 0.125, 4, 0, 0),
        (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_float,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ),
    )
    assert pack_arguments(second, [0x1000], [0x2000], 0x3000)[0] == (0x3100, 0x2000)


def test_loading_raises_the_shared_memory_limit(driver):
    """每个 kernel 在一个上下文里只装载一次，哪怕有几层用它；并设好动态共享内存。"""
    Launcher(PROGRAM)
    Launcher(PROGRAM)
    loaded = [arguments[0] for name, arguments in driver.calls if name == "cuLibraryLoadData"]
    assert sorted(loaded) == [FIRST.cubin, SECOND.cubin]
    limits = {arguments[1] for name, arguments in driver.calls if name == "cuKernelSetAttribute"}
    assert limits == {98304, 0}


def test_enqueue_only_launches(driver):
    """KERNEL-6：只调用 cuLaunchKernel：不分配、不同步；次序、网格（SM 的个数取自设备）、线程数、共享内存、流都对；没有 token 就不启动。"""
    launcher = Launcher(PROGRAM)
    driver.calls.clear()
    launcher.enqueue(((5, 8),), [0x1000], [0x2000], 0x3000, 77)
    assert [name for name, _ in driver.calls] == ["cuLaunchKernel"] * 2
    first, second = (arguments for _, arguments in driver.calls)
    assert first[1:9] == (3, 1, 1, 128, 1, 1, 98304, 77)
    assert second[1:9] == (5, 3, 1, 64, 1, 1, 0, 77)
    driver.calls.clear()
    launcher.enqueue(((0, 8),), [0x1000], [0x2000], 0x3000, 77)
    assert not driver.calls


def test_plugin_needs_no_earlier_attach(driver):
    """TRT-4：TensorRT 没有先调 attach_to_context 就 enqueue：当场装载，照样启动；之后不再装载。"""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("没有安装 tensorrt_rtx，没有插件的基类")
    plugin = plugin_class(load(FLAVOURS["rtx"]), LATENT_ATTENTION)({}, PROGRAM)
    for _ in range(2):
        plugin.enqueue([SimpleNamespace(dims=(5, 8))], [], [0x1000], [0x2000], 0x3000, 77)
    names = [name for name, _ in driver.calls]
    assert names.count("cuLibraryLoadData") == 2
    assert names.count("cuLaunchKernel") == 4


def test_misaligned_addresses_are_refused(driver):
    """KERNEL-6：kernel 按 16 字节对齐编译，没有对齐的地址在启动之前说出来，一个 kernel 也不启动。"""
    launcher = Launcher(PROGRAM)
    driver.calls.clear()
    for inputs, outputs, workspace, what in (
        ([0x1008], [0x2000], 0x3000, "Toy 的输入 0 在 0x1008"),
        ([0x1000], [0x2004], 0x3000, "Toy 的输出 0 在 0x2004"),
        ([0x1000], [0x2000], 0x3002, "Toy 的workspace 0 在 0x3002"),
    ):
        with pytest.raises(RuntimeError, match=what):
            launcher.enqueue(((5, 8),), inputs, outputs, workspace, 77)
    assert not driver.calls


def test_outputs_elsewhere_than_their_inputs_are_refused(driver):
    """KERNEL-6：就地改写的，输出不在输入的那块内存里，一个 kernel 也不启动。"""
    launcher = Launcher(replace(PROGRAM, aliases=((0, 0),)))
    launcher.enqueue(((5, 8),), [0x1000], [0x1000], 0x3000, 77)
    driver.calls.clear()
    with pytest.raises(RuntimeError, match="Toy 的输出 0 在 0x2000，应与输入 0 同在 0x1000"):
        launcher.enqueue(((5, 8),), [0x1000], [0x2000], 0x3000, 77)
    assert not driver.calls


def test_driver_failure_names_the_program(driver):
    """驱动报错时说是哪个算子。"""
    launcher = Launcher(PROGRAM)
    driver.status = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(RuntimeError, match="Toy（sm90）：CUDA 驱动报告 CUDA_ERROR_INVALID_VALUE"):
        launcher.enqueue(((5, 8),), [0x1000], [0x2000], 0x3000, 77)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="这台机器有 NVIDIA 驱动")
def test_without_a_driver():
    """DSX-E905：只有一行说明，没有 traceback。"""
    with pytest.raises(DsxError, match="DSX-E905") as caught:
        Launcher(PROGRAM)
    assert "\n" not in caught.value.what
