"""模型按层、按部分拆开，再合成一个个 stage：各放多少，各算多久。"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from deepseek_export.checkpoint import expected_tensors
from deepseek_export.plan.balance import Span
from deepseek_export.plan.gpus import Gpu
from deepseek_export.plan.shape import PARTS, ModelShape, Part, part_of
from deepseek_export.plan.simulate import Work

_LAYERS = "model.layers."
#: 一个张量归谁：第几层，或最前、最后、草稿模块。
_Place = int | Literal["first", "last", "drafts"]
_Counts = Mapping[Part, float]


class StageCost:
    """一个 stage 在一种机器上的 roofline：一个小批至少要几秒。

    Args:
        machine: 规格。
        shape: 只有这个 stage 的层。
        parts: 各部分的权重字节数。
        fp8: 各部分有几分之几的参数是 FP8。
        cache: 每个 token 在这几层的缓存，字节。
    """

    def __init__(
        self, machine: Gpu, shape: ModelShape, parts: _Counts, fp8: Mapping[Part, float], cache: float
    ) -> None:
        self._machine, self._shape, self._cache = machine, shape, cache
        self._parts = parts
        wide = machine.fp8_flops or machine.flops
        each = {
            part: 2.0 * shape.active_in(part) * (fp8[part] / wide + (1 - fp8[part]) / machine.flops)
            for part in PARTS
        }
        self._head_s = each["head"]
        self._token_s = sum(each[part] for part in PARTS if part not in ("embed", "head"))

    def memory(self, work: Work) -> float:
        """只看内存带宽：权重各读一遍（专家只读命中的），加已有的缓存。"""
        read = self._shape.weights_read(self._parts, work.tokens) + self._cache * work.depth
        return read / self._machine.bandwidth

    def compute(self, work: Work) -> float:
        """只看算力；每条只有一个位置过输出头。"""
        seen = (2 * work.depth + work.tokens) // (2 * work.rows)
        prefill = work.tokens > work.rows
        flops = self._shape.prefill_attention_flops(seen) if prefill else self._shape.attention_flops(seen)
        each = self._token_s + flops / self._machine.flops
        return work.tokens * each + work.rows * self._head_s

    def seconds(self, work: Work) -> float:
        """两样里慢的那个。"""
        return max(self.memory(work), self.compute(work))


@dataclass(frozen=True)
class LayeredModel:
    """一个模型的每一层。

    Attributes:
        shape: 整个模型，不含草稿模块。
        nbytes, parameters: 每一层各部分的字节数、参数个数。
        first, last: 另在第一个、最后一个 stage 的字节数。
        drafts: 草稿模块的字节数，在最后一个 stage，不算进速度。
        head: 输出头的参数个数。
        fp8: 各部分有几分之几的参数是 FP8。
        cache: 每一层每个 token 的缓存，字节；``draft_cache`` 是草稿模块一共的。
    """

    shape: ModelShape
    nbytes: Sequence[_Counts]
    parameters: Sequence[_Counts]
    first: _Counts
    last: _Counts
    drafts: float
    head: float
    fp8: Mapping[Part, float]
    cache: Sequence[float]
    draft_cache: float

    @classmethod
    def build(
        cls,
        shape: ModelShape,
        tensors: Iterable[tuple[str, Part, float]],
        fp8: Mapping[Part, float],
        cache_dtype: str,
    ) -> LayeredModel:
        """由每个张量的名字、部分与字节数拼成。

        Args:
            shape: 整个模型，方案打开 MTP 时含草稿模块。
            tensors: 要放的张量。
            fp8: 各部分有几分之几的参数是 FP8。
            cache_dtype: 缓存的 dtype。
        """
        config = shape.config
        layers = config.num_hidden_layers
        held = _placed(tensors, layers)
        counted = _placed(
            ((name, part_of(name, dims), math.prod(dims)) for name, dims in expected_tensors(config).items()),
            layers,
        )
        embed, drafts = held["first"]["embed"], sum(held["drafts"].values())
        if not held["last"]["head"]:  # 与词嵌入共用的输出头：另一头也要一份
            held["last"]["head"] = embed

        def cached(begin: int, end: int) -> float:
            latent, expanded = _part(shape, begin, end).cache_bytes_per_token(cache_dtype, config.dtype)
            return latent if shape.latent else expanded

        return cls(
            shape=_part(shape, 0, layers),
            nbytes=[held[layer] for layer in range(layers)],
            parameters=[counted[layer] for layer in range(layers)],
            first=held["first"],
            last=held["last"],
            drafts=drafts + embed if drafts else 0.0,
            head=counted["last"]["head"] or counted["first"]["embed"],
            fp8=fp8,
            cache=[cached(layer, layer + 1) for layer in range(layers)],
            draft_cache=cached(layers, shape.cached_layers),
        )

    def held(self, span: Span) -> tuple[float, float]:
        """一段放多少权重；它的缓存里每个 token 占多少。"""
        begin, end = span
        weights = sum(sum(counts.values()) for counts in self.nbytes[begin:end])
        cache = sum(self.cache[begin:end])
        if begin == 0:
            weights += sum(self.first.values())
        if end == len(self.nbytes):
            weights += sum(self.last.values()) + self.drafts
            cache += self.draft_cache
        return weights, cache

    def cost(self, span: Span, machine: Gpu, head: bool = True) -> StageCost:
        """一段在 ``machine`` 上的 roofline；``head`` 为假时最后一段不算输出头。"""
        begin, end = span
        parts, parameters = _total(self.nbytes[begin:end]), _total(self.parameters[begin:end])
        if head and end == len(self.nbytes):
            parts, parameters["head"] = _total([parts, self.last]), self.head
        whole = {part: round(count) for part, count in parameters.items()}
        shape = replace(_part(self.shape, begin, end), parameters=whole)
        return StageCost(machine, shape, parts, self.fp8, sum(self.cache[begin:end]))

    def seconds(self, work: Work, machine: Gpu) -> tuple[list[float], float]:
        """每一层算一个小批多久，以及输出头另要多久：按时间切分的重量。"""
        spans = [(layer, layer + 1) for layer in range(len(self.nbytes))]
        inner = [self.cost(span, machine, head=False).seconds(work) for span in spans]
        return inner, self.cost(spans[-1], machine).seconds(work) - inner[-1]


def _part(shape: ModelShape, begin: int, end: int) -> ModelShape:
    """只有 ``[begin, end)`` 这几层的缓存。"""
    indexed = sum(map(shape.config.runs_indexer, range(begin, end)))
    return replace(shape, cached_layers=end - begin, index_layers=indexed)


def _total(counts: Iterable[_Counts]) -> dict[Part, float]:
    found: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    for one in counts:
        for part, count in one.items():
            found[part] += count
    return found


def _placed(tensors: Iterable[tuple[str, Part, float]], layers: int) -> dict[_Place, dict[Part, float]]:
    places: tuple[_Place, ...] = (*range(layers), "first", "last", "drafts")
    found: dict[_Place, dict[Part, float]] = {place: dict.fromkeys(PARTS, 0.0) for place in places}
    for name, part, count in tensors:
        found[_place(name, part, layers)][part] += count
    return found


def layer_of(name: str) -> int | None:
    """检查点里的一个张量在第几层；草稿模块的接在主干之后，不在层里的没有。"""
    layer = name.removeprefix(_LAYERS).split(".", 1)[0] if name.startswith(_LAYERS) else ""
    return int(layer) if layer.isdecimal() else None


def _place(name: str, part: Part, layers: int) -> _Place:
    layer = layer_of(name)
    if layer is None:
        return "first" if part == "embed" else "last"
    return layer if layer < layers else "drafts"
