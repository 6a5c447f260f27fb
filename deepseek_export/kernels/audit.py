"""读编译好的机器码：主循环里的乘加是不是恰好那么多，拷贝与计算重不重叠，有没有溢出到本地内存。不需要 GPU。

读的是主循环（:mod:`.machine_code`），数的是一次迭代：

- 乘加：张量核指令的 M·N·K 之和，除以这个块该有的。大于 1 是重复计算。
- 拷贝：``LDGSTS``（显存直接到共享内存）搬的字节数，除以该搬的；ptxas 把循环展开几次，这个比值就是几。
- 重叠：循环里等拷贝的地方（``DEPBAR.LE SB0, n``）允许几组还在路上。0 是算的时候没有拷贝在飞。
- 溢出：``LDL``、``STL`` 的条数。

各周期数是估计（:class:`Estimate`）：只由指令数与卡的规格得出，没有在 GPU 上量过。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from deepseek_export.kernels.codes import E4M3, CodeFormat
from deepseek_export.kernels.compile import compile_kernel
from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.index_topk_launch import index_topk_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.machine_code import disassemble, main_loop
from deepseek_export.kernels.program import LaunchTable
from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
from deepseek_export.kernels.table import SMS, KernelSpec

_WARP = 32
#: 权重是码的各按哪种码审计：整数的 block 是缺省的 32，e4m3 的是发布的检查点的。
FORMATS = (CodeFormat("int8", 32), CodeFormat("int4", 32), CodeFormat(E4M3, 128, 128))
#: 潜缓存审计哪几种 dtype。
CACHES = ("bfloat16", "int8")


@dataclass(frozen=True)
class LoopAudit:
    """主循环的一次迭代。

    Attributes:
        function, tile: kernel 的函数名与块，例如 ``16x32``；权重、缓存是码的写明是哪种，例如 ``16x64 int4``、``16x64 e4m3``。
        sm: 计算能力。
        threads, shared: 线程块的线程数、共享内存字节数。
        work: 乘加的次数除以该有的；``None`` 是数不出来（sm100 的 ``UTCHMMA`` 不写形状）。
        unrolled: 循环体是几次迭代。
        in_flight: 等拷贝时至少允许几组在路上；大于 0 才重叠。
        narrow: 不是 128 位的异步拷贝有几条。
        spills: 读写本地内存的指令有几条。
        instructions: 一次迭代里一个 warp 执行几条指令。
        fmas, copied: 一次迭代里这个块该做的乘加、该搬的字节。
    """

    function: str
    tile: str
    sm: int
    threads: int
    shared: int
    work: float | None
    unrolled: int
    in_flight: int
    narrow: int
    spills: int
    instructions: float
    fmas: int
    copied: int


@dataclass(frozen=True)
class Card:
    """估计用的卡：每种 SM 一张，规格的出处见 :mod:`deepseek_export.plan.gpus`。

    Attributes:
        title: 名字。
        sms: SM 个数。
        clock: 加速频率，Hz。
        bandwidth: 显存带宽，字节每秒。
        fmas: 一个 SM 一个周期做几次 16 位乘加（float32 累加）。
    """

    title: str
    sms: int
    clock: float
    bandwidth: float
    fmas: int


CARDS: Mapping[int, Card] = MappingProxyType(
    {
        80: Card("A100 80GB SXM", 108, 1.41e9, 2.039e12, 1024),
        86: Card("A40", 84, 1.74e9, 0.696e12, 512),
        89: Card("L40S", 142, 2.52e9, 0.864e12, 512),
        90: Card("H100 SXM5", 132, 1.83e9, 3.35e12, 2048),
        100: Card("B200", 148, 1.85e9, 8.0e12, 4096),
        120: Card("RTX PRO 6000", 188, 2.6e9, 1.792e12, 512),
        121: Card("GB10", 48, 2.5e9, 0.273e12, 512),
    }
)


@dataclass(frozen=True)
class Estimate:
    """一次迭代在一个 SM 上要几个周期，一个 SM 上只有一个线程块。估计，没有量过。

    Attributes:
        tensor: 张量核，按实际的乘加。
        issue: 四个调度器发完全部指令。
        memory: 从显存搬来，按一个 SM 分到的带宽。
        of_matmul: 数据都已经在片上时，至多到这张卡算力的几成。
        of_copy: 数据都要从显存来时，至多到带宽的几成：重叠就取长的一边，不重叠就相加。
    """

    tensor: float
    issue: float
    memory: float
    of_matmul: float
    of_copy: float


def audit(spec: KernelSpec, sm: int) -> LoopAudit | None:
    """编译一个 kernel 并读它的主循环；没有张量核指令的 kernel 为 ``None``。

    Args:
        spec: kernel。
        sm: 计算能力。

    Raises:
        DsxError: ``DSX-E902``，没有 Triton 或它不带 nvdisasm；其余见 :func:`compile_kernel`。
    """
    wanted = _WANTED.get(spec.function)
    if wanted is None:
        return None
    kernel = compile_kernel(spec, sm)
    body = main_loop(disassemble(kernel.cubin))
    fmas, copied = wanted(dict(spec.constants))
    warps = kernel.threads // _WARP
    done = sum(one.fmas for one in body) * warps
    moved = sum(one.copied for one in body) * kernel.threads
    unrolled = max(1, round(moved / copied))
    waits = [one.in_flight for one in body if one.in_flight is not None]
    constants = dict(spec.constants)
    return LoopAudit(
        function=spec.function,
        tile=f"{constants['BLOCK_M']}x{constants['BLOCK_N']}{_code_name(constants)}",
        sm=sm,
        threads=kernel.threads,
        shared=kernel.shared,
        work=done / (fmas * unrolled) if done else None,
        unrolled=unrolled,
        in_flight=min(waits, default=0),
        narrow=sum(0 < one.copied < 16 for one in body),
        spills=sum(one.spills for one in body),
        instructions=len(body) / unrolled,
        fmas=fmas,
        copied=copied,
    )


def _code_name(constants: Mapping[str, int]) -> str:
    """权重或缓存是哪种码，空格开头；不是码为空。"""
    if constants.get("INT8"):
        return " int8"
    if "BITS" not in constants:
        return ""
    return " e4m3" if constants["E4M3"] else f" int{constants['BITS']}"


def estimate(found: LoopAudit) -> Estimate:
    """由一次迭代的指令数估计周期；见 :class:`Estimate`。"""
    card = CARDS[found.sm]
    tensor = found.fmas * (found.work or 1.0) / card.fmas
    issue = found.instructions * (found.threads // _WARP) / 4
    memory = found.copied / (card.bandwidth / card.sms / card.clock)
    busy = max(tensor, issue)
    whole = max(busy, memory) if found.in_flight else busy + memory
    return Estimate(tensor, issue, memory, found.fmas / card.fmas / busy, memory / whole)


def audits(
    sms: Iterable[int] = SMS, formats: Sequence[CodeFormat] = FORMATS, caches: Sequence[str] = CACHES
) -> Iterator[LoopAudit]:
    """每种 SM 上每个有张量核指令的 kernel，形状是 DeepSeek-V3 的，索引器是 V3.2 的（块只由 SM 定，与头数、专家数无关）。

    Args:
        sms: 哪几种 SM。
        formats: 权重是码的审计哪几种码。
        caches: 潜缓存审计哪几种 dtype；稀疏注意力的只有浮点的。

    Raises:
        DsxError: 见 :func:`audit`。
    """
    for sm in sms:
        tables = (
            *(latent_attention_launch(sm, 128, 512, 64, 0.1147, "bfloat16", one) for one in caches),
            index_topk_launch(sm, 64, 128, 2048, "bfloat16"),
            sparse_latent_attention_launch(sm, 128, 512, 64, 2048, 0.1147, "bfloat16"),
            grouped_swiglu_launch(sm, 256, 8, 7168, 2048, "bfloat16"),
            *(quantized_swiglu_launch(sm, 256, 8, 7168, 2048, "bfloat16", one) for one in formats),
            # int4 的线性层由编译器自己融，不用这个 kernel。
            *(
                quantized_linear_launch(sm, 7168, 16384, "bfloat16", one)
                for one in formats
                if one.codes != "int4"
            ),
        )
        for spec in dict.fromkeys(kernel for table in tables for kernel in table.kernels):
            found = audit(spec, sm)
            if found is not None:
                yield found


@dataclass(frozen=True)
class Balance:
    """一次启动的各个程序摊在各 SM 上匀不匀；一个 SM 一个程序。

    Attributes:
        programs: 分到活的程序数。
        unit: 一格几个 key。
        most: 活最多的程序有几格（一块行看一格 key）。
        idle: 从开始到最后一个程序结束，各 SM 空着的时间占几成。
    """

    programs: int
    unit: int
    most: int
    idle: float


def balance(table: LaunchTable[KernelSpec], lens: Sequence[int], capacity: int, sm_count: int) -> Balance:
    """``latent_attention_partial`` 解码一步（S=1）的各个程序匀不匀，由启动表自己的算式得出；格子怎么分见 kernel 的 ``divide`` 与 ``span_start``。

    算的是看几个 key：一段不是整块的，末尾那次迭代少搬几行，却照样是一次迭代。

    Args:
        table: ``dsx::LatentAttention`` 的启动表。
        lens: 各行已有的长度，``[B]``。
        capacity: 缓存的容量 T。
        sm_count: 卡有几个 SM。
    """
    heads, width = (int(dim) for dim in table.inputs[0].dims[2:])
    shapes = [(len(lens), 1, heads, width), (len(lens), 1, capacity, width), (len(lens),)]
    launched = table.bind(shapes, sm_count)[0]
    block = dict(launched.kernel.constants)
    row_blocks = math.ceil(heads / block["BLOCK_M"])

    def cells(unit: int) -> int:
        return row_blocks * sum(math.ceil(min(past + 1, capacity) / unit) for past in lens)

    unit, programs = block["BLOCK_N"], launched.grid[0]
    if cells(unit) < block["PLENTY"] * programs:
        unit = 1
        programs = min(programs, math.ceil(cells(unit) / block["LEAST"]))
    most = math.ceil(cells(unit) / programs)
    return Balance(programs, unit, most, 1 - cells(unit) / (sm_count * most))


def _attention(c: Mapping[str, int]) -> tuple[int, int]:
    """QKᵀ 是 M·N·(r+dr)，PV 是 M·r·N；搬一段 KV（两字节的缓存）。int8 的旋转部分是两段字节，搬的是整行。"""
    width = c["BLOCK_R"] + c["BLOCK_P"]
    row = c["WIDTH"] if c.get("INT8") else width * 2
    return c["BLOCK_M"] * c["BLOCK_N"] * (width + c["BLOCK_R"]), c["BLOCK_N"] * row


def _index_scores(c: Mapping[str, int]) -> tuple[int, int]:
    """一段 key 与全部索引头的点积；搬这一段 key（两字节的缓存）。"""
    return c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_D"], c["BLOCK_N"] * c["BLOCK_D"] * 2


def _gate_up(c: Mapping[str, int]) -> tuple[int, int]:
    rows = c["BLOCK_M"] + 2 * c["BLOCK_N"]
    return 2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"], rows * c["BLOCK_K"] * 2


def _down(c: Mapping[str, int]) -> tuple[int, int]:
    rows = c["BLOCK_M"] + c["BLOCK_N"]
    return c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"], rows * c["BLOCK_K"] * 2


def _codes(c: Mapping[str, int]) -> int:
    """一块码与它的 scale 有几个字节；e4m3 的 scale 是 float32，一行一次读一个。"""
    scales = 4 if c["E4M3"] else c["BLOCK_K"] // c["SCALED"] * 2
    return c["BLOCK_N"] * (c["BLOCK_K"] * c["BITS"] // 8 + scales)


def _quantized_gate_up(c: Mapping[str, int]) -> tuple[int, int]:
    return 2 * c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"], 2 * _codes(c) + c["BLOCK_M"] * c["BLOCK_K"] * 2


def _quantized_down(c: Mapping[str, int]) -> tuple[int, int]:
    return c["BLOCK_M"] * c["BLOCK_N"] * c["BLOCK_K"], _codes(c) + c["BLOCK_M"] * c["BLOCK_K"] * 2


#: kernel 的函数名 → 由常数得一次迭代该做的乘加、该搬的字节；不在其中的没有张量核指令，``index_topk_rows`` 的主循环就是
#: ``index_topk_scores`` 的那一段。
_WANTED: Mapping[str, Callable[[Mapping[str, int]], tuple[int, int]]] = MappingProxyType(
    {
        "latent_attention_partial": _attention,
        "sparse_latent_attention_partial": _attention,
        "index_topk_scores": _index_scores,
        "gate_up": _gate_up,
        "down": _down,
        "quantized_gate_up": _quantized_gate_up,
        "quantized_down": _quantized_down,
        "quantized_linear": _quantized_down,
    }
)
