"""int8 缓存的写入的点；读它的注意力是 :class:`perf.gpu.points.Attention` 的 ``int8``。"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_export.kernels.latent_cache_update_launch import latent_cache_update_launch
from deepseek_export.kernels.program import LaunchTable
from deepseek_export.kernels.table import KernelSpec, row_width
from deepseek_export.ops.int8_cache import encode_rows, padded_rows
from deepseek_export.ops.latent_cache_update import latent_cache_update
from deepseek_export.parity.measures import Measure
from perf.gpu.sources import LATENT, ROPE, DtypeName, Inputs, Outputs, Source, compared, scribble

#: 一行几个字节。
ROW = row_width(LATENT, ROPE, "int8")


def int8_cache(source: Source, B: int, T: int) -> torch.Tensor:
    """[B, 1, T, ROW]，还原出来是标准正态。"""
    shapes = ((B, 1, T, width) for width in (LATENT, ROPE))
    return padded_rows(encode_rows(*(source.randn(*one, dtype=torch.float32) for one in shapes)), ROW)


@dataclass(frozen=True)
class Update:
    """``LatentCacheUpdate`` 的一个点。

    Attributes:
        S, T: 本次的 token 数、缓存的容量。
        past: 各行已有的长度，B 个。
        dtype: 计算 dtype。
    """

    S: int
    T: int
    past: tuple[int, ...]
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        return f"LatentCacheUpdate B{len(self.past)} S{self.S} T{self.T}"

    @property
    def program(self) -> str:
        """见 :attr:`perf.gpu.points.Attention.program`。"""
        return f"LatentCacheUpdate {self.dtype}"

    def needs(self, *, reference: bool) -> int:
        """要几字节显存。"""
        whole = len(self.past) * (self.T * ROW + 2 * self.S * (LATENT + ROPE))
        return whole * (3 if reference else 1)

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return latent_cache_update_launch(sm, LATENT, ROPE, self.dtype)

    def inputs(self, source: Source) -> Inputs:
        """(c_kv, k_pe, kv_cache, past_lens)。"""
        B, dtype = len(self.past), getattr(torch, self.dtype)
        new = (source.randn(B, self.S, width, dtype=dtype) for width in (LATENT, ROPE))
        cache = scribble(torch.empty(B, 1, self.T, ROW, device=source.device, dtype=torch.int8))
        return *new, cache, torch.tensor(self.past, device=source.device, dtype=torch.int64)

    def outputs(self, inputs: Inputs) -> Outputs:
        """就地写：输出就是那个缓存。"""
        return (inputs[2],)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少；该逐位相同，差一个字节就是 1。"""
        c_kv, k_pe, cache, past_lens = inputs
        want = latent_cache_update(c_kv, k_pe, scribble(torch.empty_like(cache)), past_lens)
        return compared(outputs[0], want)

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算：每个数找一次最大、除一次、舍入一次。"""
        tokens, values = len(self.past) * self.S, LATENT + ROPE
        return tokens * (2 * values + ROW) + len(self.past) * 8, 3 * tokens * values

    def shapes(self) -> list[tuple[int, ...]]:
        """各输入的形状。"""
        B = len(self.past)
        return [(B, self.S, LATENT), (B, self.S, ROPE), (B, 1, self.T, ROW), (B,)]
