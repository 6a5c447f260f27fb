"""启动表的公共部分：有哪些 SM，一个算子的启动计划由什么组成；各算子的在 :mod:`.latent_attention_plan` 与 :mod:`.grouped_swiglu_plan`。

计划只查表、拼算式，不导入 Triton；:func:`~deepseek_export.kernels.compile.compile_plan` 把它编译成
:class:`~deepseek_export.kernels.program.Program`。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression
from deepseek_export.kernels.program import Argument, Tensor
from deepseek_export.ops.table import OpSpec

KernelDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Sm:
    """一种 SM。

    Attributes:
        shared: 一个线程块最多能用的共享内存，字节（CUDA C++ Programming Guide，Compute Capabilities）。
        count: 参考卡的 SM 个数；只用来决定把 KV 切成几段，别的卡上结果不变。
        card: 参考卡。
    """

    shared: int
    count: int
    card: str


SMS: Mapping[int, Sm] = MappingProxyType(
    {
        80: Sm(163 << 10, 108, "A100"),
        86: Sm(99 << 10, 84, "A40"),
        89: Sm(99 << 10, 128, "RTX 4090"),
        90: Sm(227 << 10, 132, "H100"),
        100: Sm(227 << 10, 148, "B200"),
        120: Sm(99 << 10, 170, "RTX 5090"),
        121: Sm(99 << 10, 48, "GB10"),
    }
)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """一个待编译的 kernel。

    Attributes:
        module: ``deepseek_export.kernels`` 下的模块名。
        function: 模块里的函数名。
        signature: 运行时形参 → Triton 类型，次序同函数；指针都按 16 字节对齐编译。
        constants: 编译期常数。
        num_warps, num_stages: 线程块的 warp 数、软件流水的级数。
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """一次启动；见 :class:`~deepseek_export.kernels.program.Launch`。"""

    kernel: KernelSpec
    grid: tuple[Expression, Expression, Expression]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class PlannedVariant:
    """适用于一段尺寸的一串启动；见 :class:`~deepseek_export.kernels.program.Variant`。"""

    when: Expression
    workspace: Expression
    launches: tuple[PlannedLaunch, ...]


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """一个算子的启动计划；见 :class:`~deepseek_export.kernels.program.Program`。"""

    op: str
    sm: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    variants: tuple[PlannedVariant, ...]


def check_sm(sm: int) -> Sm:
    """这种 SM 在表里吗。

    Raises:
        DsxError: ``DSX-E901``。
    """
    if sm not in SMS:
        known = "、".join(f"sm{known}" for known in SMS)
        raise DsxError("DSX-E901", f"sm{sm} 没有启动表", f"可用的有 {known}")
    return SMS[sm]


#: workspace 里每一块的对齐，字节；TensorRT 的也是这么多。
ALIGNMENT = 256


def kernel_spec(
    module: str,
    function: str,
    signature: tuple[tuple[str, str], ...],
    constants: Mapping[str, int],
    num_warps: int,
    num_stages: int,
) -> KernelSpec:
    """一个 :class:`KernelSpec`，``constants`` 写成字典。"""
    return KernelSpec(module, function, signature, tuple(constants.items()), num_warps, num_stages)


def check_dtype(op: OpSpec, port: str, dtype: str, allowed: tuple[str, ...]) -> None:
    """``port`` 的 dtype 有没有 kernel。

    Raises:
        DsxError: ``DSX-E903``。
    """
    if dtype not in allowed:
        what = f"{op.name} 的 {port} 是 {dtype}"
        raise DsxError("DSX-E903", what, f"kernel 支持 {'、'.join(allowed)}；换一个 --dtype 导出")


def block_size(size: int) -> int:
    """不小于 ``size`` 的 2 的幂；``tl.dot`` 的每一维至少 16。"""
    return max(16, 1 << (size - 1).bit_length())
