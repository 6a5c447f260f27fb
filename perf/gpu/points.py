"""一个点：哪个算子、什么形状；它的输入、启动表、与参考实现差多少、至少要读写与运算多少。

稀疏注意力的两个算子在 :mod:`perf.gpu.sparse_points`，权重是码的在 :mod:`perf.gpu.coded_points`。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch

from deepseek_export.kernels.codes import E4M3
from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.program import LaunchTable
from deepseek_export.kernels.table import KernelSpec
from deepseek_export.ops.latent_attention import latent_attention
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.parity.measures import Measure
from perf.gpu.coded_points import CODES, QuantizedExperts, QuantizedLinear
from perf.gpu.int8_points import ROW, Update, int8_cache
from perf.gpu.sources import (
    EXPERTS,
    LATENT,
    ROPE,
    SCALE,
    DtypeName,
    Inputs,
    Outputs,
    Source,
    compared,
    latent_bytes,
    latent_context,
    unwritten,
)
from perf.gpu.sparse_points import Selection, SparseAttention, every_row

#: 参考实现把缓存、权重与分数转成 float32，连同输入一共是输入的几倍。
_REFERENCE = 4


@dataclass(frozen=True)
class Attention:
    """``LatentAttention`` 的一个点。

    Attributes:
        H, S, T: 头数、本次的 token 数、缓存的容量。
        past: 各行已有的长度，B 个；负数按 0。
        dtype: 计算 dtype。
        label: 代替长长的 ``past`` 写进名字。
        int8: 缓存是 int8 的。
    """

    H: int
    S: int
    T: int
    past: tuple[int, ...]
    dtype: DtypeName = "bfloat16"
    label: str = ""
    int8: bool = False

    @property
    def name(self) -> str:
        """格子的名字。"""
        cache = " int8 缓存" * self.int8
        return f"LatentAttention H{self.H} B{len(self.past)} S{self.S} T{self.T}{self.label}{cache}"

    @property
    def program(self) -> str:
        """哪个程序；核对不过时，同一个程序的计时都带记号。"""
        return f"LatentAttention H{self.H} {self.dtype}" + " int8 缓存" * self.int8

    @property
    def row_bytes(self) -> int:
        """缓存的一行几个字节。"""
        return ROW if self.int8 else 2 * (LATENT + ROPE)

    def needs(self, *, reference: bool) -> int:
        """要几字节显存。"""
        B = len(self.past)
        scores = B * self.S * self.H * self.T * 4 * 3 if reference else 0
        whole = B * (self.T * self.row_bytes + 2 * self.S * self.H * (2 * LATENT + ROPE))
        copies = _REFERENCE * (2 if self.int8 else 1)
        return whole * (copies if reference else 2) + scores

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        cache = "int8" if self.int8 else None
        return latent_attention_launch(sm, self.H, LATENT, ROPE, SCALE, self.dtype, cache)

    def inputs(self, source: Source) -> Inputs:
        """(q, kv_cache, past_lens)；看不见的缓存行是 NaN，int8 的是极大的数：每个字节 91，两个 scale 约 2^105。"""
        dtype = getattr(torch, self.dtype)
        if self.int8:
            cache = int8_cache(source, len(self.past), self.T)
            for b, length in enumerate(self.past):
                cache[b, :, max(length, 0) + self.S :] = 91
        else:
            cache = source.cache(self.past, self.S, self.T, LATENT + ROPE, dtype)
        return source.latent_queries(len(self.past), self.S, self.H, dtype), cache, source.lens(self.past)

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：[H, B*S, r]。"""
        return (latent_context(inputs[0]),)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少。"""
        q, cache, past_lens = inputs
        return compared(outputs[0], latent_attention(q, cache.nan_to_num(0), past_lens, SCALE, LATENT))

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算；看不见的行不算。"""
        q, _, past_lens = inputs
        keys = sum(min(length + self.S, self.T) for length in self.past)
        traffic = self.row_bytes * keys + latent_bytes(q) + past_lens.numel() * 8
        return traffic, 2 * self.S * self.H * keys * (2 * LATENT + ROPE)

    def shapes(self) -> list[tuple[int, ...]]:
        """各输入的形状。"""
        B, width = len(self.past), LATENT + ROPE
        return [(B, self.S, self.H, width), (B, 1, self.T, ROW if self.int8 else width), (B,)]


@dataclass(frozen=True)
class Experts:
    """``MoeExperts`` 的一个点。

    Attributes:
        shape: :data:`~perf.gpu.sources.EXPERTS` 的名字。
        N: token 数。
        used: 只路由到前几个专家；``None`` 是全部。
        dtype: 计算 dtype。
    """

    shape: str
    N: int
    used: int | None = None
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        return f"MoeExperts {self.shape} N{self.N}" + (f" 专家{self.used}个" if self.used else "")

    @property
    def program(self) -> str:
        """见 :attr:`Attention.program`。"""
        return f"MoeExperts {self.shape} {self.dtype}"

    def needs(self, *, reference: bool) -> int:
        """要几字节显存；参考实现一次只展开一个专家。"""
        E, k, D, inner = EXPERTS[self.shape]
        tokens = self.N * k * (D + inner) * 2
        return 2 * 3 * E * D * inner + tokens * (_REFERENCE if reference else 2) + (12 * D * inner)

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return grouped_swiglu_launch(sm, *EXPERTS[self.shape], self.dtype)

    def inputs(self, source: Source) -> Inputs:
        """(x, topk_ids, topk_weights, w_gate, w_up, w_down)。"""
        E, k, D, inner = EXPERTS[self.shape]
        dtype = getattr(torch, self.dtype)
        sizes = ((inner, D), (inner, D), (D, inner))
        weights = tuple(source.randn(E, *s, dtype=dtype, scale=s[1] ** -0.5) for s in sizes)
        return *source.routed(self.N, E, k, D, self.used, dtype), *weights

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：[N, D]。"""
        return (unwritten(inputs[0]),)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少。"""
        return compared(outputs[0], moe_experts(*inputs))

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算；没有 token 的专家不读。"""
        _, k, D, inner = EXPERTS[self.shape]
        active = int(inputs[1].unique().numel())
        return active * 3 * D * inner * 2 + 2 * inputs[0].numel() * 2, 6 * self.N * k * D * inner

    def shapes(self) -> list[tuple[int, ...]]:
        """各输入的形状。"""
        E, k, D, inner = EXPERTS[self.shape]
        return [(self.N, D), (self.N, k), (self.N, k), (E, inner, D), (E, inner, D), (E, D, inner)]


Point: TypeAlias = (
    Attention | Experts | QuantizedExperts | QuantizedLinear | Selection | SparseAttention | Update
)
_KINDS = (Attention, Experts, QuantizedExperts, QuantizedLinear, Selection, SparseAttention, Update)
#: 写进结果、由它还原出点：``{"op": 类名, 其余是字段}``。
_POINTS: dict[str, Callable[..., Point]] = {kind.__name__: kind for kind in _KINDS}


def from_row(fields: dict[str, Any]) -> Point:
    """:func:`to_row` 的逆。"""
    fields = dict(fields)
    if "past" in fields:
        fields["past"] = tuple(fields["past"])
    return _POINTS[fields.pop("op")](**fields)


def to_row(point: Point) -> dict[str, Any]:
    """写进结果的样子。"""
    return {"op": type(point).__name__, **vars(point)}


def full(H: int, B: int, S: int, T: int, int8: bool = False) -> Attention:
    """每一行都填满缓存。"""
    return Attention(H, S, T, every_row(B, S, T), int8=int8)


def ragged(H: int, B: int, T: int) -> Attention:
    """一行最长，其余减半再减半，直到 16；次序打散。"""
    lengths = sorted((max(16, (T - 1) >> (i % 12)) for i in range(B)), key=lambda n: n * 2654435761 % 97)
    return Attention(H, 1, T, tuple(lengths), label=" 长短不齐")


def dtyped(points: Sequence[Point], dtype: DtypeName) -> list[Point]:
    """同样的点，换一种 dtype。"""
    return [cast(Point, type(point)(**{**vars(point), "dtype": dtype})) for point in points]


TINY: tuple[Point, ...] = (
    Attention(16, 1, 96, (0, 65, 95)),
    Experts("tiny", 5),
    Selection(1, 96, (0, 65, 95), topk=32),
    SparseAttention(16, 1, 96, (0, 65, 95), topk=32),
    *(QuantizedExperts("tiny", 5, codes) for codes in CODES),
    *(QuantizedLinear("tiny", 5, codes) for codes in CODES),
    Attention(16, 1, 96, (0, 65, 95), int8=True),
    Update(2, 96, (0, 65, 94)),
)
CHECKED: tuple[Point, ...] = (
    *(
        Attention(H, S, T, past, int8=int8)
        for int8 in (False, True)
        for H in (16, 128)
        for S, T, past in ((1, 4096, (0, 1, 63, 64, 65, 4095, 1000)), (8, 2048, (2040, 0, 7, 511)))
    ),
    *(Update(S, 2048, (0, 7, 1500)) for S in (1, 500)),
    *(Experts("V2-Lite", N) for N in (1, 7, 300)),
    Experts("V3", 16),
    *(Selection(S, T, past) for S, T, past in ((1, 8192, (0, 2047, 2048, 8191)), (300, 4096, (3700, 1900)))),
    *(
        SparseAttention(H, S, 8192, past)
        for H in (16, 128)
        for S, past in ((1, (0, 100, 2048, 8191)), (5, (4000, 2045)))
    ),
    *(QuantizedExperts("V2-Lite", N, codes) for codes in CODES for N in (1, 300)),
    *(QuantizedExperts("V3", 16, codes) for codes in CODES),
    *(QuantizedLinear("V3 o_proj", rows, codes) for codes in CODES for rows in (1, 40, 300)),
)
HEADLINE: tuple[Point, ...] = (
    *(full(H, B, 1, T) for H in (16, 128) for B in (1, 16, 128) for T in (1024, 8192, 32768)),
    full(128, 16, 4, 8192),
    *(full(H, B, 1, T, int8=True) for H in (16, 128) for B in (1, 16) for T in (8192, 32768)),
    *(Experts(shape, N) for shape in ("V2-Lite", "V3") for N in (1, 16, 128, 1024, 4096)),
    *(Selection(1, T, every_row(B, 1, T)) for B in (1, 16) for T in (8192, 32768, 131072)),
    *(SparseAttention(128, 1, T, every_row(B, 1, T)) for B in (1, 16) for T in (8192, 131072)),
    *(
        QuantizedExperts(shape, N, codes)
        for codes in CODES
        for shape in ("V2-Lite", "V3")
        for N in (1, 16, 128, 1024)
    ),
    # int4 的线性层由 TensorRT 自己融，引擎里没有这个 kernel，只核对。
    *(QuantizedLinear("V3 o_proj", rows, codes) for codes in ("int8", E4M3) for rows in (1, 16, 256)),
)
AWKWARD: tuple[Point, ...] = (
    *(full(H, B, 1, 8192) for H in (16, 128) for B in (33, 67, 100, 133)),
    *(ragged(H, 64, 32768) for H in (16, 128)),
    *(full(H, B, 1, 131072) for H in (16, 128) for B in (1, 4)),
    Experts("V2-Lite", 64, 6),
)
PROFILED: tuple[Point, ...] = (full(128, 16, 1, 8192), Experts("V2-Lite", 128))
_OTHERS: tuple[Point, ...] = (
    *(
        Attention(H, S, T, past)
        for H in (16, 128)
        for S, T, past in (
            (1, 1, (0,)),
            (2, 700, (0, 698, 33)),
            (5, 300, (295, 0)),
            (1, 20000, (19999,)),
        )
    ),
    # 最后两种把 token 挤到少数专家上：小块与大块的变体都走到，其余专家没有 token。
    *(Experts("V2-Lite", N, used) for N, used in ((64, 6), (3000, 7))),
    *(Experts("V3", N, used) for N, used in ((1, None), (7, None), (300, None), (64, 8), (3000, 9))),
    *(QuantizedExperts("V2-Lite", N, codes, 7) for codes in CODES for N in (64, 3000)),
    *(QuantizedLinear("V2-Lite gate_proj", rows, codes) for codes in CODES for rows in (1, 17, 3000)),
)
REST: tuple[Point, ...] = (*_OTHERS, *dtyped((*CHECKED, *_OTHERS), "float16"))
EVERY: tuple[Point, ...] = (*TINY, *CHECKED, *HEADLINE, *AWKWARD, *PROFILED, *REST)
