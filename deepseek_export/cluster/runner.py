"""一套 stage 上的一张图，合起来是一个 ``Runner``。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from deepseek_export.backend.base import Caches, Limits, Runner
from deepseek_export.backend.contract import GraphContract, Port
from deepseek_export.bundle.manifest import GraphEntry, ValueEntry
from deepseek_export.cluster.caches import PipelineCaches
from deepseek_export.cluster.gang import Gang
from deepseek_export.errors import DsxError


class PipelineRunner(Runner):
    """主模型沿环走过每个 stage；草稿模块整个在最后一个 stage 里，前面的只是递过去。

    Args:
        gang: 起好的一套 stage。
        graph: 整个模型的那张图。
    """

    def __init__(self, gang: Gang, graph: GraphEntry) -> None:
        self.contract = GraphContract.of(map(_port, graph.inputs), map(_port, graph.outputs))
        self._gang, self._graph = gang, graph.file
        self.limits = _narrowest(
            [Limits(**stage["limits"][graph.file]) for stage in gang.stages if graph.file in stage["limits"]]
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for stage in self._gang.stages for note in stage["notes"]))

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
        meta = {"op": "run", "graph": self._graph, "start": own.start, "count": own.batch}
        arrays = {
            name: np.asarray(inputs[name]).astype(port.numpy, copy=False)
            for name, port in self.contract.inputs.items()
        }
        found = own.storage.call({**meta, "outputs": list(outputs)}, arrays)
        return {name: found.arrays[name] for name in outputs}


def _narrowest(limits: list[Limits]) -> Limits:
    """每个 stage 都做得到的。"""

    def least(values: list[int | None]) -> int | None:
        return min((value for value in values if value is not None), default=None)

    return Limits(
        max_positions=min(one.max_positions for one in limits),
        prefill_chunk=min(one.prefill_chunk for one in limits),
        logits_rows=least([one.logits_rows for one in limits]),
        max_batch=least([one.max_batch for one in limits]),
        dtypes=tuple(limits[0].dtypes),
        block_outputs=False,
    )


def _port(value: ValueEntry) -> Port:
    return Port(value.name, value.dtype, tuple(value.shape))
