"""各上下文长度上解码一步：多少秒，读了多少字节，占这台机器读速的几成。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from deepseek_export.benchmark.depth import DepthDecoder
from deepseek_export.benchmark.reading import MemoryReader, step_bytes
from deepseek_export.benchmark.spread import Spread, interleaved
from deepseek_export.bundle.manifest import Manifest
from deepseek_export.runtime import ModelSession


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Read(_Model):
    """一步解码至少要读的，与读得多快。

    Attributes:
        weight_bytes, cache_bytes: 见 :class:`~deepseek_export.benchmark.reading.StepBytes`。
        bytes_per_second: 合计除以一步的秒数。
        share: 占这台机器读速的几分之几；权重与缓存放得进末级 cache 时可以大于 1。读速不知道就是 ``None``。
    """

    weight_bytes: int
    cache_bytes: int
    bytes_per_second: Spread
    share: Spread | None


class Depth(_Model):
    """某个上下文长度上解码一步，按 bundle 分。

    Attributes:
        context: 上下文长度。
        step_s: 一步的秒数。
        reads: 一步读了多少。
        machine_bytes_per_second: 紧接着量的，这台机器每秒读得动的字节数；没有 C++ 算子库就不知道。
    """

    context: int
    step_s: dict[str, Spread]
    reads: dict[str, Read]
    machine_bytes_per_second: Spread | None


def measure_depth(
    manifests: Mapping[str, Sequence[Manifest]],
    sessions: Mapping[str, ModelSession],
    context: int,
    reader: MemoryReader | None,
    batch: int,
    runs: int,
    seed: int,
) -> Depth:
    """交替地走同一步；读速在那之后另量：夹在中间会把权重挤出 cache，小模型的一步就慢了。

    Args:
        manifests: 每个 bundle 的 manifest，见 :func:`~deepseek_export.benchmark.reading.step_bytes`。
        sessions: 每个 bundle 的主模型。
        context: 上下文长度。
        reader: 读速的探针；``None`` 不量。
        batch: 行数。
        runs: 每个几遍。
        seed: 缓存内容的种子。
    """
    decoders = {name: DepthDecoder(session, batch, context, seed) for name, session in sessions.items()}
    steps = interleaved({name: decoder.step for name, decoder in decoders.items()}, runs)
    machine = None if reader is None else Spread.of([reader.rate() for _ in range(runs)])
    reads = {}
    for name, seconds in steps.items():
        read = step_bytes(manifests[name], batch, context)
        rate = Spread.of([read.total / second for second in seconds])
        reads[name] = Read(
            weight_bytes=read.weights,
            cache_bytes=read.cache,
            bytes_per_second=rate,
            share=None if machine is None else rate.scaled(1 / machine.median),
        )
    return Depth(
        context=context,
        step_s={name: Spread.of(seconds) for name, seconds in steps.items()},
        reads=reads,
        machine_bytes_per_second=machine,
    )
