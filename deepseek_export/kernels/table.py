"""启动表的公共部分：有哪些 SM，怎样写一次启动；各算子的在 :mod:`.latent_attention_launch` 与 :mod:`.grouped_swiglu_launch`。

启动表只拼算式，不导入 Triton；:func:`~deepseek_export.kernels.compile.compile_table` 把它编译成
:data:`~deepseek_export.kernels.program.Program`。
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, Size
from deepseek_export.kernels.program import POINTER_ALIGNMENT, Argument, Launch, LaunchTable, Tensor, Variant
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec, Port, TypeVar

KernelDtype = Literal["float16", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Sm:
    """一种 SM。

    Attributes:
        shared: 一个线程块最多能用的共享内存，字节（CUDA C++ Programming Guide，Compute Capabilities）。
        most: 这种 SM 的卡至多几个 SM；workspace 按它留。KV 切成几段看运行时那张卡的个数，不超过它。
        card: SM 最多的卡。
    """

    shared: int
    most: int
    card: str


SMS: Mapping[int, Sm] = MappingProxyType(
    {
        80: Sm(163 << 10, 108, "A100"),
        86: Sm(99 << 10, 84, "A40"),
        89: Sm(99 << 10, 142, "L40S"),
        90: Sm(227 << 10, 132, "H100"),
        100: Sm(227 << 10, 148, "B200"),
        120: Sm(99 << 10, 188, "RTX PRO 6000"),
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


@dataclass(frozen=True, slots=True)
class Parameter:
    """kernel 的一个运行时形参，与启动时给它的值。

    Attributes:
        name: kernel 里的名字。
        type: Triton 的类型。
        argument: 启动时给什么。
    """

    name: str
    type: str
    argument: Argument[Expression]


def scratch(name: str, dtype: str, offset: Size) -> Parameter:
    """workspace 里第 ``offset`` 字节起的一块 ``dtype``。"""
    return Parameter(name, DTYPES[dtype].triton, Argument("workspace", Expression.of(offset)))


def int32(name: str, value: Size) -> Parameter:
    """整数标量。"""
    return Parameter(name, "i32", Argument("int32", Expression.of(value)))


def float32(name: str, value: float) -> Parameter:
    """浮点标量。"""
    return Parameter(name, "fp32", Argument("float32", value))


@dataclass(frozen=True, slots=True)
class Problem:
    """编译时已知的：哪个算子、哪种 SM、静态的维与 dtype；输入输出都由契约表得出。

    Attributes:
        op: 契约。
        sm: 计算能力。
        sizes: 契约里的维 → 大小；不在其中的维到运行时才知道，是符号。
        dtypes: 类型变量 → dtype；只容一种 dtype 的不必给。
    """

    op: OpSpec
    sm: int
    sizes: Mapping[str, int]
    dtypes: Mapping[TypeVar, str]

    def port(self, name: str) -> Parameter:
        """名为 ``name`` 的输入或输出，作为同名的 kernel 形参。"""
        kind, index, port = self.op.find(name)
        return Parameter(name, DTYPES[self._dtype(port)].triton, Argument(kind, index))

    def table(self, variants: Sequence[Variant[KernelSpec]]) -> LaunchTable[KernelSpec]:
        """这些变体组成的启动表。"""
        inputs, outputs = (tuple(map(self._tensor, ports)) for ports in (self.op.inputs, self.op.outputs))
        return LaunchTable(self.op.name, self.sm, inputs, outputs, tuple(variants), self.op.aliased())

    def _dtype(self, port: Port) -> str:
        return self.dtypes.get(port.type) or TYPE_CONSTRAINTS[port.type][0]

    def _tensor(self, port: Port) -> Tensor:
        return Tensor(self._dtype(port), tuple(str(self.sizes.get(dim, dim)) for dim in port.dims))


def launch(
    module: str,
    function: str,
    grid: tuple[Size, Size, Size],
    parameters: Sequence[Parameter],
    constants: Mapping[str, int],
    num_warps: int,
    num_stages: int,
) -> Launch[KernelSpec, Expression]:
    """一次启动：``parameters`` 的次序同函数，其余见 :class:`KernelSpec`。"""
    x, y, z = map(Expression.of, grid)
    signature = tuple((parameter.name, parameter.type) for parameter in parameters)
    kernel = KernelSpec(module, function, signature, tuple(constants.items()), num_warps, num_stages)
    return Launch(kernel, (x, y, z), tuple(parameter.argument for parameter in parameters))


def check_dtype(op: OpSpec, port: str, dtype: str, allowed: tuple[str, ...]) -> None:
    """``port`` 的 dtype 有没有 kernel。

    Raises:
        DsxError: ``DSX-E903``。
    """
    if dtype not in allowed:
        what = f"{op.name} 的 {port} 是 {dtype}"
        raise DsxError("DSX-E903", what, f"kernel 支持 {'、'.join(allowed)}；换一个 --dtype 导出")


def cached_problem(
    op: OpSpec, cache: str, sm: int, sizes: Mapping[str, int], dtype: str, cache_dtype: str | None
) -> Problem:
    """读一个缓存的算子：``q`` 是 16 位的，缓存另可以是 float32；契约容 int8 的也可以是 int8。

    Args:
        op, sm, sizes: 见 :class:`Problem`。
        cache: 缓存那个输入的名字。
        dtype: ``q`` 与输出的 dtype。
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持。
    """
    check_sm(sm)
    stored = cache_dtype or dtype
    check_dtype(op, "q", dtype, ("float16", "bfloat16"))
    kind = op.find(cache)[2].type
    allowed = ("float16", "bfloat16", "float32", "int8")
    check_dtype(op, cache, stored, tuple(one for one in allowed if one in TYPE_CONSTRAINTS[kind]))
    return Problem(op, sm, sizes, {"T": dtype, kind: stored})


def row_width(kv_lora_rank: int, qk_rope_head_dim: int, cache_dtype: str) -> int:
    """潜缓存的一行有几个元素；int8 的末尾补零到 128 位的倍数，见 :mod:`~deepseek_export.ops.int8_cache`。"""
    if cache_dtype != "int8":
        return kv_lora_rank + qk_rope_head_dim
    return math.ceil((kv_lora_rank + 2 * qk_rope_head_dim + 6) / POINTER_ALIGNMENT) * POINTER_ALIGNMENT


def fewer_keys(keys: int, num_stages: int, cache_dtype: str) -> tuple[int, int]:
    """一次几个 key、几级流水：float32 的缓存每个 key 占两倍共享内存，一次少读一半的 key，已经只有 16 个（tl.dot 的下限）的就少一级流水。"""
    fewer = keys * 2 // max(DTYPES[cache_dtype].nbytes(1), 2)
    return (fewer, num_stages) if fewer >= 16 else (16, num_stages - 1)


def block_size(size: int) -> int:
    """不小于 ``size`` 的 2 的幂；``tl.dot`` 的每一维至少 16。"""
    return max(16, 1 << (size - 1).bit_length())
