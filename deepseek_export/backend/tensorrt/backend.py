"""``--backend trt``：TensorRT 引擎。"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.backend.base import Backend, CutRunner, Limits
from deepseek_export.backend.tensorrt.cuda import require_gpu
from deepseek_export.backend.tensorrt.engine import find_engine, max_logits_rows
from deepseek_export.backend.tensorrt.runner import TensorRTRunner
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.engine.derived import engine_bundle


class TensorRTBackend(Backend):
    """要先 ``dsx build``；引擎由之建成的那个 bundle 才是实际运行的，见 :mod:`deepseek_export.engine.derived`。"""

    name = "trt"

    def prepared(self, bundle: Bundle) -> Bundle:
        """引擎由之建成的 bundle。

        Raises:
            DsxError: ``DSX-E918`` 没有 GPU；``DSX-E920`` 没有引擎。
        """
        require_gpu()
        return engine_bundle(bundle)

    def limits(self, bundle: Bundle, graph: GraphEntry | None = None) -> Limits:
        """引擎目录里记的形状。

        Raises:
            DsxError: ``DSX-E918`` 没有 GPU；``DSX-E920`` 没有引擎；``DSX-E917`` 引擎与这里不符。
        """
        graph = graph or bundle.manifest.main
        directory, record = find_engine(bundle, require_gpu())
        entry = record.plans[_engine_path(directory, graph).name]
        profiles = entry.profiles.values()
        verifies = any("K" in value.shape for value in graph.inputs)
        return Limits(
            max_positions=min(bundle.manifest.model.max_position_embeddings, record.shapes.capacity),
            prefill_chunk=max(ranges["S"][2] for ranges in profiles),
            logits_rows=max_logits_rows(entry, verifies),
            max_batch=max(ranges["B"][2] for ranges in profiles),
            dtypes=("float16", "bfloat16"),
            block_outputs=False,
        )

    def open(
        self, bundle: Bundle, graph: GraphEntry, weights: BundleWeights, threads: int | None = None
    ) -> TensorRTRunner:
        """同 :meth:`Backend.open`；权重在引擎里，``weights`` 与 ``threads`` 用不着。

        Raises:
            DsxError: ``DSX-E918`` 没有 GPU；``DSX-E920`` 没有引擎；``DSX-E917`` 引擎与这里不符；``DSX-E914`` / ``DSX-E916`` 加载失败。
        """
        directory, _ = find_engine(bundle, require_gpu())
        return TensorRTRunner(bundle, _engine_path(directory, graph), self.limits(bundle, graph))

    def cut_runner(self, bundle: Bundle) -> CutRunner:
        # 到这里才导入：建引擎的那一半只有 dsx compare 用。
        from deepseek_export.backend.tensorrt.cut import cut_runner

        return cut_runner(bundle)


def _engine_path(directory: Path, graph: GraphEntry) -> Path:
    return directory / Path(graph.file).with_suffix(".plan").name


BACKEND = TensorRTBackend()
