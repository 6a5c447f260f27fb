"""稀疏注意力两个算子的点；V3.2 的形状：64 个索引头、宽 128，缺省的名额 2048。"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_export.kernels.index_topk_launch import index_topk_launch
from deepseek_export.kernels.program import LaunchTable
from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
from deepseek_export.kernels.table import KernelSpec
from deepseek_export.ops.index_topk import index_topk
from deepseek_export.ops.lightning_indexer import key_counts, last_visible, visible_scores
from deepseek_export.ops.sparse_latent_attention import sparse_latent_attention
from deepseek_export.ops.sparse_mla_attention import chosen_keys
from deepseek_export.parity.measures import Measure
from deepseek_export.parity.selection import Ranking
from deepseek_export.parity.tolerances import SELECTION_BAND
from perf.gpu.sources import (
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

INDEX_HEADS, INDEX_WIDTH, TOPK = 64, 128, 2048
#: 参考实现的分数转成 float32，遮罩、排名各一份。
_COPIES = 6


@dataclass(frozen=True)
class Selection:
    """``IndexTopK`` 的一个点。

    Attributes:
        S, T: 本次的 token 数、缓存的容量。
        past: 各行已有的长度，B 个。
        topk: 名额。
        dtype: 计算 dtype。
    """

    S: int
    T: int
    past: tuple[int, ...]
    topk: int = TOPK
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        return f"IndexTopK B{len(self.past)} S{self.S} T{self.T} 选 {self.topk}"

    @property
    def program(self) -> str:
        """见 :attr:`perf.gpu.points.Attention.program`。"""
        return f"IndexTopK {self.topk} {self.dtype}"

    def needs(self, *, reference: bool) -> int:
        """要几字节显存。"""
        B, queries = len(self.past), len(self.past) * self.S
        whole = 2 * INDEX_WIDTH * (B * self.T + queries * INDEX_HEADS) + 4 * queries * (self.T + self.topk)
        scores = 4 * queries * self.T * (INDEX_HEADS + _COPIES)
        return 2 * whole + (scores if reference else 0)

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return index_topk_launch(sm, INDEX_HEADS, INDEX_WIDTH, self.topk, self.dtype)

    def inputs(self, source: Source) -> Inputs:
        """(q, w, index_cache, past_lens)；看不见的缓存行是 NaN。"""
        dtype, B = getattr(torch, self.dtype), len(self.past)
        cache = source.cache(self.past, self.S, self.T, INDEX_WIDTH, dtype)
        q = source.randn(B, self.S, INDEX_HEADS, INDEX_WIDTH, dtype=dtype)
        w = source.randn(B, self.S, INDEX_HEADS, dtype=torch.float32)
        return q, w, cache, source.lens(self.past)

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：indices、counts。"""
        indices = inputs[-1].new_empty(len(self.past), self.S, self.topk, dtype=torch.int32)
        return unwritten(indices), unwritten(indices[..., 0])

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """选中的集合与个数；并列带之内换过的先还原，剩下的必须全同。"""
        q, w, cache, past_lens = inputs
        want, counts = index_topk(q, w, cache, past_lens, self.topk)
        # 乱写的下标先换成没有选中，不让它变成越界。
        given = torch.where((outputs[0] >= -1) & (outputs[0] < self.T), outputs[0], -1)
        masks = [chosen_keys(indices, self.T).float() for indices in (given, want)]
        ranking = Ranking(visible_scores(q, w, cache, last_visible(past_lens, q)).cpu(), self.topk)
        got, expected = (mask.cpu().numpy() for mask in masks)
        kept, _ = ranking.without_ties(got, expected, SELECTION_BAND["float32"])
        pairs = ((torch.from_numpy(kept), outputs[1].cpu()), (torch.from_numpy(expected), counts.cpu()))
        return compared(*(torch.cat([mask, count[..., None].float()], -1) for mask, count in pairs))

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算；不必排名的 query 不读 key。"""
        rows = [seen for seen in _seen(self.past, self.S) if seen > self.topk]
        keys = sum(length + self.S for length in self.past if length + self.S > self.topk)
        traffic = 2 * INDEX_WIDTH * keys + 2 * inputs[0].numel() + 4 * len(self.past) * self.S * self.topk
        return traffic, 2 * INDEX_HEADS * INDEX_WIDTH * sum(rows)

    def shapes(self) -> list[tuple[int, ...]]:
        """各输入的形状。"""
        B = len(self.past)
        heads = (B, self.S, INDEX_HEADS)
        return [(*heads, INDEX_WIDTH), heads, (B, 1, self.T, INDEX_WIDTH), (B,)]


@dataclass(frozen=True)
class SparseAttention:
    """``SparseLatentAttention`` 的一个点。

    Attributes:
        H, S, T: 头数、本次的 token 数、缓存的容量。
        past: 各行已有的长度，B 个。
        topk: 名额；选中的是随机的。
        dtype: 计算 dtype。
    """

    H: int
    S: int
    T: int
    past: tuple[int, ...]
    topk: int = TOPK
    dtype: DtypeName = "bfloat16"

    @property
    def name(self) -> str:
        """格子的名字。"""
        return f"SparseLatentAttention H{self.H} B{len(self.past)} S{self.S} T{self.T} 选 {self.topk}"

    @property
    def program(self) -> str:
        """见 :attr:`perf.gpu.points.Attention.program`。"""
        return f"SparseLatentAttention H{self.H} {self.topk} {self.dtype}"

    def needs(self, *, reference: bool) -> int:
        """要几字节显存；参考实现把选中的行收集成 float32。"""
        B, queries, width = len(self.past), len(self.past) * self.S, LATENT + ROPE
        whole = 2 * B * self.T * width + queries * (2 * self.H * (width + LATENT) + 8 * self.T)
        rows = 4 * queries * self.topk * (2 * width + 3 * self.H)
        return 2 * whole + (rows if reference else 0)

    def table(self, sm: int) -> LaunchTable[KernelSpec]:
        """启动表。"""
        return sparse_latent_attention_launch(sm, self.H, LATENT, ROPE, self.topk, SCALE, self.dtype)

    def inputs(self, source: Source) -> Inputs:
        """(q, kv_cache, indices, counts)；没有选中的缓存行是 NaN。"""
        dtype, B = getattr(torch, self.dtype), len(self.past)
        past = source.lens(self.past)
        counts = key_counts(past, self.S, self.topk)
        lots = source.rand(B, self.S, self.T)
        last = past[:, None] + torch.arange(self.S, device=source.device)
        lots.masked_fill_(torch.arange(self.T, device=source.device) > last[..., None], -1.0)
        indices = lots.topk(min(self.topk, self.T), -1).indices.to(torch.int32)
        unused = torch.arange(indices.shape[-1], device=source.device) >= counts[..., None]
        indices = indices.masked_fill(unused, self.T).sort(-1).values
        indices = torch.nn.functional.pad(indices, (0, self.topk - indices.shape[-1]), value=self.T)
        indices = indices.masked_fill(indices == self.T, -1)
        cache = source.randn(B, 1, self.T, LATENT + ROPE, dtype=dtype)
        cache[:, 0][~chosen_keys(indices, self.T).any(1)] = float("nan")
        return source.latent_queries(B, self.S, self.H, dtype), cache, indices, counts

    def outputs(self, inputs: Inputs) -> Outputs:
        """没有写过的输出：[H, B*S, r]。"""
        return (latent_context(inputs[0]),)

    def measure(self, inputs: Inputs, outputs: Outputs) -> Measure:
        """与参考实现差多少。"""
        q, cache, indices, counts = inputs
        want = sparse_latent_attention(q, cache.nan_to_num(0), indices, counts, SCALE, LATENT)
        return compared(outputs[0], want)

    def work(self, inputs: Inputs) -> tuple[int, int]:
        """至少要读写的字节、浮点运算；一个 query 收集它自己的行。"""
        q, _, indices, counts = inputs
        rows = sum(min(seen, self.topk) for seen in _seen(self.past, self.S))
        traffic = 2 * rows * (LATENT + ROPE) + latent_bytes(q) + 4 * (indices.numel() + counts.numel())
        return traffic, 2 * self.H * rows * (2 * LATENT + ROPE)

    def shapes(self) -> list[tuple[int, ...]]:
        """各输入的形状。"""
        B, width = len(self.past), LATENT + ROPE
        chosen = (B, self.S, self.topk)
        return [(B, self.S, self.H, width), (B, 1, self.T, width), chosen, chosen[:2]]


def every_row(B: int, S: int, T: int) -> tuple[int, ...]:
    """每一行都填满缓存。"""
    return (T - S,) * B


def _seen(past: tuple[int, ...], S: int) -> list[int]:
    """每个 query 看得见几个 key。"""
    return [length + i + 1 for length in past for i in range(S)]
