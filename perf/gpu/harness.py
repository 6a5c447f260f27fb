"""``perf.gpu.session`` 的器具：中毒的缓冲区、启动、计时、参照的带宽与算力。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from deepseek_export.kernels.launcher import Launcher
from deepseek_export.kernels.program import Program

_GUARD = 256
_SECONDS_PER_POINT = 0.25
_FLUSH = 256 << 20  # 大于任何一张卡的 L2


class Runner:
    """在 torch 的张量上运行一个程序；workspace 按 TensorRT 的办法一次分配，填满 NaN，末尾有哨兵。"""

    def __init__(self, program: Program, largest: Sequence[torch.Tensor]) -> None:
        self.program = program
        self._launcher = Launcher(program)
        size = program.workspace([tuple(t.shape) for t in largest])
        self._workspace = torch.empty(size + _GUARD, dtype=torch.uint8, device="cuda")

    def poison(self) -> None:
        """每个字节都是 0xFF：任何浮点 dtype 下都是 NaN。"""
        self._workspace.fill_(0xFF)

    def intact(self) -> bool:
        """哨兵没有被改写。"""
        return bool((self._workspace[-_GUARD:] == 0xFF).all())

    def __call__(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        shapes = tuple(tuple(t.shape) for t in inputs)
        self._launcher.enqueue(
            shapes,
            [t.data_ptr() for t in inputs],
            [output.data_ptr()],
            self._workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )


def time_graph(call: Callable[[], None]) -> list[float]:
    """把 ``call`` 录进 CUDA graph 后计时：不含 Python 与启动的开销，每次之前用大块写入冲掉 L2。"""
    call()  # 第一次会装载机器码，不能发生在录制中
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_call(graph.replay)


def time_call(call: Callable[[], object]) -> list[float]:
    """每次的秒数；重复到约 0.25 秒，至少 5 次，至多 100 次。"""
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device="cuda")

    def once() -> float:
        flush.zero_()
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


def copy_bandwidth() -> float:
    """大块设备内拷贝的带宽（读加写），每秒几字节；访存受限的上限。"""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median(time_call(lambda: target.copy_(source)))


def matmul_rate(dtype: torch.dtype) -> float:
    """8192 阶方阵乘法的速率，每秒几次运算；计算受限的上限。"""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty(n, n, device="cuda", dtype=dtype)
    return 2 * n**3 / median(time_call(lambda: torch.matmul(a, b, out=out)))
