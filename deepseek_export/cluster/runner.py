"""一套 stage 上的一张图，合起来是一个 ``Runner``。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from deepseek_export.backend.base import Caches, Limits, Runner
from deepseek_export.backend.contract import PORT_DIMS, GraphContract, Port
from deepseek_export.bundle.manifest import GraphEntry, ValueEntry
from deepseek_export.cluster.caches import PipelineCaches
from deepseek_export.cluster.gang import Gang
from deepseek_export.cluster.wire import Frame
from deepseek_export.errors import DsxError


class PipelineRunner(Runner):
    """主模型沿环走过每个 stage；草稿模块整个在最后一个 stage 里，前面的只是递过去。

    Args:
        gang: 起好的一套 stage。
        graph: 整个模型的那张图。
        micro_batches: 一次调用至多分成几个小批，见 :class:`~deepseek_export.cluster.settings.ClusterSettings`。
    """

    def __init__(self, gang: Gang, graph: GraphEntry, micro_batches: int = 1) -> None:
        self.contract = GraphContract.of(map(_port, graph.inputs), map(_port, graph.outputs))
        self._gang, self._graph = gang, graph.file
        self._micro_batches = micro_batches
        self.limits = narrowest(
            [Limits(**stage["limits"][graph.file]) for stage in gang.stages if graph.file in stage["limits"]]
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for stage in self._gang.stages for note in stage["notes"]))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """各 stage 起好时报的：``pid``、``resident``（字节）、``limits``、``notes``。"""
        return self._gang.stages

    @property
    def failure(self) -> DsxError | None:
        return self._gang.failure

    @property
    def generation(self) -> int:
        return self._gang.generation

    def close(self) -> None:
        self._gang.close()

    def new_caches(self, batch: int, needed: int = 1) -> PipelineCaches:
        """同 :meth:`Runner.new_caches`；``DSX-E742`` / ``DSX-E743``，流水线断了、正在重启。"""
        return PipelineCaches.allocate(self._gang, self._graph, self.contract.caches, batch, needed)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], caches: Caches
    ) -> dict[str, np.ndarray]:
        """同 :meth:`Runner.run`；``DSX-E742`` / ``DSX-E743``，流水线断了、正在重启，``DSX-E747`` 缓存随它丢了。"""
        own = cast(PipelineCaches, caches)  # 这个 Runner 分配的
        meta = {"op": "run", "graph": self._graph, "outputs": list(outputs)}
        arrays = {
            name: np.asarray(inputs[name]).astype(port.numpy, copy=False)
            for name, port in self.contract.inputs.items()
        }
        frames = []
        for rows in np.array_split(np.arange(own.batch), min(self._micro_batches, own.batch)):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            part = {name: a[start:stop] if PORT_DIMS[name][0] == "B" else a for name, a in arrays.items()}
            frames.append(Frame({**meta, "start": own.start + start, "count": stop - start}, part))
        found = [frame.arrays for frame in own.storage.call_all(frames)]
        if len(found) == 1:
            return {name: found[0][name] for name in outputs}
        return {name: np.concatenate([arrays[name] for arrays in found]) for name in outputs}


def narrowest(limits: Sequence[Limits]) -> Limits:
    """每个 stage 都做得到的。"""

    def least(values: list[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return Limits(
        max_positions=min(one.max_positions for one in limits),
        prefill_chunk=min(one.prefill_chunk for one in limits),
        logits_rows=least([one.logits_rows for one in limits]),
        max_batch=least([one.max_batch for one in limits]),
        dtypes=tuple(limits[0].dtypes),
        grows=all(one.grows for one in limits),
        block_outputs=False,
    )


def _port(value: ValueEntry) -> Port:
    return Port(value.name, value.dtype, tuple(value.shape))
