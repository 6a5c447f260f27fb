"""放不放得下、怎么切、每秒多少 token 的上界：一种切法由最忙的那块卡决定。"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deepseek_export.plan.gpus import Gpu
from deepseek_export.plan.result import Bound, GpuPlan, Split, SplitPlan
from deepseek_export.plan.shape import PARTS, ModelShape, Part

#: 显存里留给激活、工作区与碎片的比例。
RESERVE = 0.10
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)

ROOFLINE_ASSUMPTIONS = [
    f"显存留出 {RESERVE:.0%} 给激活、工作区与碎片；GB 按十进制",
    "tensor：头与列均分，潜缓存每卡一份（MLA 只有一个 KV 头），展开的缓存按头均分；"
    "expert：专家均分，其余每卡一份，batch 按卡分；pipeline：按层均分，词嵌入与 lm_head 各在一端",
    "速度是 roofline 上界：每步最忙的那块卡把自己要用的权重与缓存各读一遍，每卡一份的每卡都读；带宽与算力都取峰值，不计通信与 kernel 开销；"
    "batch 里命中的专家数按均匀路由估计；pipeline 的 batch 可以分成几份依次流过，取最快的分法；投机解码不计",
    "算力按 FP16 峰值；检查点里是 FP8 的权重在有 FP8 的 GPU 上按 FP8 峰值，注意力总按 FP16；"
    "prefill 只有最后一个位置过 lm_head，mla.form 不是 absorb 时注意力按展开的形式算",
]


@dataclass(frozen=True)
class _Card:
    """一种切法里最忙的那块卡。

    Attributes:
        held: 每一部分的权重放几分之几。
        cache: 全部缓存放几分之几。
        work: 每个 token 的注意力算几分之几（按头、按层分）。
        rows: 专家之外的部分每步经手几条序列；专家总是面对整个 batch。
        stages: 流水线有几段。
    """

    split: Split
    held: Mapping[Part, float]
    cache: float
    work: float
    rows: int
    stages: int = 1


def usable_bytes(gpu: Gpu) -> int:
    """能放权重与缓存的显存。"""
    return int(gpu.memory * (1 - RESERVE))


def _slower(memory: float, compute: float) -> tuple[float, Bound]:
    return (memory, "memory") if memory >= compute else (compute, "compute")


class Estimate:
    """同一个模型、同一组 batch 与 context，在不同 GPU 上各算一遍。

    Args:
        shape: 模型的形状。
        parts: 各部分的权重字节数。
        fp8: 各部分有几分之几的参数是 FP8。
        cache_bytes: 全部序列的缓存。
        batch: 序列数。
        context: 每条序列的长度。
    """

    def __init__(
        self,
        shape: ModelShape,
        parts: Mapping[Part, float],
        fp8: Mapping[Part, float],
        cache_bytes: int,
        batch: int,
        context: int,
    ) -> None:
        self.shape, self.parts, self.fp8 = shape, parts, fp8
        self.cache_bytes, self.batch, self.context = cache_bytes, batch, context

    def on(self, name: str, gpu: Gpu, count: int) -> GpuPlan:
        """``count`` 块 ``gpu``。"""
        requested = self.splits(gpu, count)
        candidates = (self._plan(gpu, card, n) for n in _COUNTS for card in self._cards(n))
        smallest = min(
            (split for split in candidates if split.fits),
            key=lambda s: (s.gpus, s.weight_bytes + s.cache_bytes),
            default=None,
        )
        best = max(
            (split for split in requested if split.fits),
            key=lambda s: s.decode_tokens_per_second or 0.0,
            default=None,
        )
        return GpuPlan(
            gpu=name,
            title=gpu.title,
            usable_bytes=usable_bytes(gpu),
            requested=requested,
            no_split=None if requested else self._no_split(count),
            smallest=smallest,
            decode_split=best and best.split,
            decode_tokens_per_second=best and best.decode_tokens_per_second,
            decode_bound=best and best.decode_bound,
            prefill_tokens_per_second=self._prefill(gpu, count) if best else None,
        )

    def splits(self, gpu: Gpu, count: int) -> list[SplitPlan]:
        """``count`` 块 ``gpu`` 的每一种切法；切不开的不列。"""
        return [self._plan(gpu, card, count) for card in self._cards(count)]

    def _cards(self, n: int) -> Iterator[_Card]:
        """``n`` 块卡的每一种切法里最忙的那块卡；切不开的（头数、专家数、层数不够）不列。"""
        c, shape, batch = self.shape.config, self.shape, self.batch
        whole: dict[Part, float] = dict.fromkeys(PARTS, 1.0)
        if n == 1:
            yield _Card("single", whole, 1.0, 1.0, batch)
            return
        if c.num_attention_heads % n == 0:
            held: dict[Part, float] = {**dict.fromkeys(PARTS, 1 / n), "small": 1.0}
            yield _Card("tensor", held, 1.0 if shape.latent else 1 / n, 1 / n, batch)
        if self.parts["experts"] and c.n_routed_experts % n == 0:
            rows = math.ceil(batch / n)
            yield _Card("expert", {**whole, "experts": 1 / n}, rows / batch, 1.0, rows)
        if n <= shape.cached_layers:
            layers = math.ceil(shape.cached_layers / n) / shape.cached_layers
            larger: Part = "embed" if self.parts["embed"] >= self.parts["head"] else "head"
            ends: dict[Part, float] = {"embed": 0.0, "head": 0.0}
            held = {**dict.fromkeys(PARTS, layers), **ends, larger: 1.0}
            yield _Card("pipeline", held, layers, layers, batch, stages=n)

    def _no_split(self, n: int) -> str:
        c = self.shape.config
        experts = f"、{c.n_routed_experts} 个专家都" if self.parts["experts"] else ""
        return (
            f"{n} 块没有一种切法：{c.num_attention_heads} 个注意力头{experts}不能被 {n} 整除，"
            f"{self.shape.cached_layers} 层也不够分给 {n} 块"
        )

    def _plan(self, gpu: Gpu, card: _Card, n: int) -> SplitPlan:
        weight_bytes = math.ceil(sum(self.parts[part] * card.held[part] for part in PARTS))
        cache_bytes = math.ceil(self.cache_bytes * card.cache)
        fits = weight_bytes + cache_bytes <= usable_bytes(gpu)
        seconds, bound = self._step(gpu, card)
        return SplitPlan(
            split=card.split,
            gpus=n,
            weight_bytes=weight_bytes,
            cache_bytes=cache_bytes,
            fits=fits,
            decode_tokens_per_second=self.batch / seconds if fits else None,
            decode_bound=bound if fits else None,
        )

    def _step(self, gpu: Gpu, card: _Card) -> tuple[float, Bound]:
        """一步给每条序列一个 token 至少要多久，受什么限制。

        流水线把 batch 分成 ``m`` 份依次流过：最慢的一段要处理 ``m`` 份，一份要走完全部的段，取长的那个；``m`` 取最快的。
        最慢的一段只计它的层，两端的词嵌入与 lm_head 计在走完全部的段里。
        """
        if card.stages == 1:
            return _slower(
                self._read(card.held, self.batch, card.cache) / gpu.bandwidth,
                self._compute(gpu, card.held, card.rows, self.batch, card.work),
            )
        whole: dict[Part, float] = dict.fromkeys(PARTS, 1.0)
        inner: dict[Part, float] = {**card.held, "embed": 0.0, "head": 0.0}
        steps = []
        for m in range(1, min(card.stages, self.batch) + 1):
            tokens = self.batch / m
            read = max(m * self._read(inner, tokens, card.cache / m), self._read(whole, tokens, 1 / m))
            compute = max(
                m * self._compute(gpu, inner, tokens, tokens, card.work),
                self._compute(gpu, whole, tokens, tokens, 1.0),
            )
            steps.append(_slower(read / gpu.bandwidth, compute))
        return min(steps)

    def _read(self, held: Mapping[Part, float], tokens: float, cache: float) -> float:
        """放着 ``held`` 的卡解码 ``tokens`` 个 token 读多少字节：另有 lm_head 时词嵌入只查几行，路由专家只读命中的。"""
        parts = {part: self.parts[part] * held[part] for part in PARTS}
        return self.shape.weights_read(parts, tokens, tied=not self.parts["head"]) + self.cache_bytes * cache

    def _compute(
        self, gpu: Gpu, held: Mapping[Part, float], rows: float, tokens: float, work: float
    ) -> float:
        """专家之外的部分经手 ``rows`` 个 token、专家经手 ``tokens`` 个，至少要几秒。"""
        matmul = sum(
            self._matmul(gpu, part) * held[part] * (tokens if part == "experts" else rows) for part in PARTS
        )
        return matmul + rows * work * self.shape.attention_flops(self.context) / gpu.flops

    def _matmul(self, gpu: Gpu, part: Part) -> float:
        """一个 token 与一部分的全部权重相乘，至少要几秒。"""
        fp8 = self.fp8[part]
        return 2.0 * self.shape.active_in(part) * (fp8 / (gpu.fp8_flops or gpu.flops) + (1 - fp8) / gpu.flops)

    def _prefill(self, gpu: Gpu, count: int) -> float:
        """长 prompt 受算力限制，各卡都占满；注意力按平均长度 ``context / 2`` 计。"""
        output = "embed" if self.shape.config.tie_word_embeddings else "head"
        matmul = sum(self._matmul(gpu, part) for part in PARTS if part != output)
        attention = self.shape.prefill_attention_flops(self.context // 2) / gpu.flops
        return count / (matmul + attention)
