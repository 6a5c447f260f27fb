"""权重是码的两个算子的点：``QuantizedMoeExperts``、``QuantizedLinear``，int8、int4 每 32 个码一个 scale，e4m3 是发布的 128×128 的块。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from deepseek_export.dtypes import DTYPES
from deepseek_export.kernels.codes import E4M3, CodeDtype, CodeFormat
from deepseek_export.kernels.program import LaunchTable
from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
from deepseek_export.kernels.table import KernelSpec
from deepseek_export.ops.coded_weights import widened
from deepseek_export.ops.moe_experts import active_experts, expert_step
from deepseek_export.parity.measures import Measure
from perf.gpu.sources import EXPERTS, DtypeName, Inputs, Outputs, Source, compared, unwritten

_FORMATS = (CodeFormat("int8", 32), CodeFormat("int4", 32), CodeFormat(E4M3, 128, 128))
#: 码 → 它的写法。
CODES: Mapping[CodeDtype, CodeFormat] = MappingProxyType({one.codes: one for one in _FORMATS})
#: 均匀的字节当作码的均方根：除以它，还原的权重就和 1/sqrt(K) 差不多大。
_RMS: Mapping[CodeDtype, float] = MappingProxyType({"int8": 73.9, "int4": 4.6, E4M3: 108.0})
#: 线性层的形状：名字 → (N, K)。``tiny`` 的两维都不是 128 的倍数。
LINEARS = {"V3 o_proj": (7168, 16384), "V2-Lite gate_proj": (10944, 2048), "tiny": (72, 160)}
#: 还原一个矩阵的一个元素，参考实现的各个中间值一共几个字节。
_WIDENING = 40


def coded(
    source: Source, form: CodeFormat, *shape: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """随机的码与 scale，权重的形状是 ``shape``：有限的码都出现，还原之后约 1/sqrt(K)。"""
    *leading, N, K = shape
    codes = source.int8(*leading, N, K * DTYPES[form.codes].bits // 8)
    if form.codes == E4M3:
        for one in codes.view(-1, codes.shape[-1]).split(1 << 14):
            one.masked_fill_((one & 0x7F) == 0x7F, 0)  # 这两个码是 NaN
    scales = source.rand(*leading, math.ceil(N / form.rows), math.ceil(K / form.columns))
    scales = scales.add_(0.5).mul_(K**-0.5 / _RMS[form.codes])
    return codes, scales if form.codes == E4M3 else scales.to(dtype)


def unpacked(codes: torch.Tensor, form: CodeFormat) -> torch.Tensor:
    """每个码一个字节：int4 的两个一字节，低位在前。"""
    if form.codes != "int4":
        return codes
    return torch.stack((((codes & 15) ^ 8) - 8, codes >> 4), -1).flatten(-2)


def restored(codes: torch.Tensor, scales: torch.Tensor, form: CodeFormat, dtype: torch.dtype) -> torch.Tensor:
    """参考实现还原的权重。"""
    e4m3 = int(form.codes == E4M3)
    return widened(unpacked(codes, form), scales, form.columns, form.rows, e4m3, dtype)


def code_bytes(form: CodeFormat, N: int, K: int) -> int:
    """一个权重 [N, K] 的码与 scale 有几个字节；计算 dtype 是 16 位的。"""
    wide = DTYPES[form.dtypes("bfloat16")["S"]].nbytes(1)
    return DTYPES[form.codes].nbytes(N * K) + wide * math.ceil(N / form.rows) * math.ceil(K / form.columns)


@dataclass(frozen=True)
class QuantizedExperts:
    """``QuantizedMoeExperts`` 的一个点。

    Attributes:
        shape: :data:`~perf.gpu.sources.EXPERTS` 的名字。
        N: token 数。
        codes: :data:`CODES` 的哪一种。
        used: 只路由到前几个专家；``None`` 是全部。
        dtype: 计算 dtype。
    """

    shape: str
    N: int
    codes: CodeDtype
    used: int | None = None
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        few = f" 专家{self.used}个" if self.used else ""
        return f"QuantizedMoeExperts {self.shape} N{self.N} {self.codes}{few}"

    @property
    def program(self) -> str:
        """见 :attr:`perf.gpu.points.Attention.program`。"""
        return f"QuantizedMoeExperts {self.shape} {self.codes} {self.dtype}"

    @property
    def _expert(self) -> int:
        """一个专家有几个字节。"""
        _, _, D, inner = EXPERTS[self.shape]
        form = CODES[self.codes]
        return 2 * code_bytes(form, inner, D) + code_bytes(form, D, inner)

    def needs(self, *, reference: bool) -> int:
        """要几字节显存；参考实现一次只还原一个专家。"""
        E, k, D, inner = EXPERTS[self.shape]
        tokens = self.N * k * (D + inner) * 2
        return E * self._expert + tokens * (4 if reference else 2) + _WIDENING * D * inner * reference

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return quantized_swiglu_launch(sm, *EXPERTS[self.shape], self.dtype, CODES[self.codes])

    def inputs(self, source: Source) -> Inputs:
        """(x, topk_ids, topk_weights, 三个权重各自的码与 scale)。"""
        E, k, D, inner = EXPERTS[self.shape]
        dtype, form = getattr(torch, self.dtype), CODES[self.codes]
        pairs = (coded(source, form, E, *one, dtype=dtype) for one in ((inner, D), (inner, D), (D, inner)))
        weights = [tensor for pair in pairs for tensor in pair]
        return *source.routed(self.N, E, k, D, self.used, dtype), *weights

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：[N, D]。"""
        return (unwritten(inputs[0]),)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少；一次还原一个专家，别的专家的码不读。"""
        x, ids, weights, *stored = inputs
        form = CODES[self.codes]
        y, experts = active_experts(x, ids, stored[0].shape[0])
        only = torch.zeros(1, dtype=torch.int64, device=x.device)
        for expert in experts.tolist():
            pairs = zip(stored[::2], stored[1::2], strict=True)
            matrices = [
                restored(codes[expert], scales[expert], form, x.dtype).unsqueeze(0) for codes, scales in pairs
            ]
            mine = torch.where(ids == expert, 0, -1).to(ids.dtype)
            y = expert_step(y, only, x, mine, weights, *matrices)
        return compared(outputs[0], y.to(x.dtype))

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算；没有 token 的专家不读。"""
        _, k, D, inner = EXPERTS[self.shape]
        active = int(inputs[1].unique().numel())
        return active * self._expert + 2 * inputs[0].numel() * 2, 6 * self.N * k * D * inner

    def shapes(self) -> list[tuple[int, ...]]:
        """契约里各输入的形状。"""
        E, k, D, inner = EXPERTS[self.shape]
        form = CODES[self.codes]
        found: list[tuple[int, ...]] = [(self.N, D), (self.N, k), (self.N, k)]
        for N, K in ((inner, D), (inner, D), (D, inner)):
            found += [(E, N, K), (E, math.ceil(N / form.rows), math.ceil(K / form.columns))]
        return found


@dataclass(frozen=True)
class QuantizedLinear:
    """``QuantizedLinear`` 的一个点。

    Attributes:
        shape: :data:`LINEARS` 的名字。
        rows: 一共几行 token。
        codes: :data:`CODES` 的哪一种。
        dtype: 计算 dtype。
    """

    shape: str
    rows: int
    codes: CodeDtype
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        return f"QuantizedLinear {self.shape} 行{self.rows} {self.codes}"

    @property
    def program(self) -> str:
        """见 :attr:`perf.gpu.points.Attention.program`。"""
        return f"QuantizedLinear {self.shape} {self.codes} {self.dtype}"

    @property
    def _weight(self) -> int:
        return code_bytes(CODES[self.codes], *LINEARS[self.shape])

    def needs(self, *, reference: bool) -> int:
        """要几字节显存。"""
        N, K = LINEARS[self.shape]
        rows = self.rows * (N + K) * 2
        return self._weight + rows * (4 if reference else 2) + _WIDENING * N * K * reference

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return quantized_linear_launch(sm, *LINEARS[self.shape], self.dtype, CODES[self.codes])

    def inputs(self, source: Source) -> Inputs:
        """(x, w, w_scales)。"""
        dtype, (N, K) = getattr(torch, self.dtype), LINEARS[self.shape]
        x = source.randn(self.rows, 1, K, dtype=dtype)
        return x, *coded(source, CODES[self.codes], N, K, dtype=dtype)

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：[B, S, N]。"""
        return (unwritten(inputs[0].new_empty(self.rows, 1, LINEARS[self.shape][0])),)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少。"""
        x, codes, scales = inputs
        want = torch.nn.functional.linear(x, restored(codes, scales, CODES[self.codes], x.dtype))
        return compared(outputs[0], want)

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算。"""
        N, K = LINEARS[self.shape]
        return self._weight + 2 * self.rows * (N + K), 2 * self.rows * N * K

    def shapes(self) -> list[tuple[int, ...]]:
        """契约里各输入的形状。"""
        (N, K), form = LINEARS[self.shape], CODES[self.codes]
        scales = (math.ceil(N / form.rows), math.ceil(K / form.columns))
        return [(self.rows, 1, K), (N, K), scales]
