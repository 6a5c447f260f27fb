"""一张真的卡：启动、计时、显存。别的文件都不碰 ``torch.cuda``；测试换上一张假的。

启动走的就是插件的路径：提前编译的 :class:`Program` 与 :class:`Launcher`，不经过 Triton 的运行时。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch

from deepseek_export.kernels.compile import compile_kernel, compile_table
from deepseek_export.kernels.launcher import Launcher
from deepseek_export.kernels.program import LaunchTable, Program
from deepseek_export.kernels.table import KernelSpec
from perf.gpu.sources import shapes_of

_GUARD = 256
_SECONDS_PER_POINT = 0.25
_FLUSH = 256 << 20  # 大于任何一张卡的 L2


class Runner:
    """在 torch 的张量上运行一个程序；workspace 按 TensorRT 的办法一次分配，填满 NaN，末尾有哨兵。"""

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor]) -> None:
        self.program = program
        self._launcher = Launcher(program)
        size = program.workspace(shapes_of(program, inputs))
        self.workspace = torch.empty(size + _GUARD, dtype=torch.uint8, device="cuda")

    def poison(self) -> None:
        """每个字节都是 0xFF：任何浮点 dtype 下都是 NaN。"""
        self.workspace.fill_(0xFF)

    def intact(self) -> bool:
        """哨兵没有被改写。"""
        return bool((self.workspace[-_GUARD:] == 0xFF).all())

    def __call__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self._launcher.enqueue(
            tuple(shapes_of(self.program, inputs)),
            [t.data_ptr() for t in inputs],
            [t.data_ptr() for t in outputs],
            self.workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


class Card:
    """当前的卡。

    Attributes:
        device: torch 的设备名。
        sm: 计算能力，例如 90。
    """

    device = "cuda"

    @staticmethod
    def missing() -> str | None:
        """为什么用不了；能用是 ``None``。"""
        return None if torch.cuda.is_available() else "没有可用的 NVIDIA GPU，什么也没有测"

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.sm = major * 10 + minor

    def facts(self) -> dict[str, Any]:
        """写进记录的：名字、SM、显存、各库的版本。"""
        properties = torch.cuda.get_device_properties(0)
        versions = {name: version(name) for name in ("triton", "cuda-bindings")}
        return {
            "card": torch.cuda.get_device_name(),
            "sm": self.sm,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "versions": versions | {"torch": torch.__version__, "cuda": torch.version.cuda},
        }

    def free(self) -> int:
        """还空着几字节显存。"""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def compile(self, tables: Iterable[LaunchTable[KernelSpec]]) -> int:
        """用上全部的核，把要用的 kernel 编译进磁盘缓存；返回个数。"""
        specs = list(dict.fromkeys(spec for table in tables for spec in table.kernels))
        workers = min(len(specs), os.cpu_count() or 1)
        # 子进程不能继承父进程的 CUDA 上下文，所以不用 fork。
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for _ in pool.map(compile_kernel, specs, [self.sm] * len(specs)):
                pass
        return len(specs)

    def runner(self, table: LaunchTable[KernelSpec], inputs: Sequence[torch.Tensor]) -> Runner:
        """一个程序的 :class:`Runner`，workspace 够 ``inputs`` 用。"""
        return Runner(compile_table(table), inputs)

    def graph(self, call: Callable[[], None]) -> Callable[[], None]:
        """录成 CUDA graph，返回重放它的函数；``call`` 要先执行过一次，第一次会装载机器码。"""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def synchronize(self) -> None:
        """等卡上的事做完。"""
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> list[float]:
        """每次的秒数；重复到约 0.25 秒，至少 5 次，至多 100 次。

        每次之前把 L2 换成别的内容，用读不用写：写会留下没有写回的行，被测的一次要替它们写回。
        """
        flush = torch.zeros(_FLUSH // 4, dtype=torch.int32, device="cuda")
        sink = torch.empty((), dtype=torch.int32, device="cuda")

        def once() -> float:
            torch.amax(flush, dim=0, out=sink)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        once()
        estimate = once()
        count = max(5, min(100, int(_SECONDS_PER_POINT / max(estimate, 1e-6))))
        return [once() for _ in range(count)]

    def stream(self) -> int:
        """当前的流。"""
        return int(torch.cuda.current_stream().cuda_stream)
