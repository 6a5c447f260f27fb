"""``--backend ort``：ONNX Runtime CPU。"""

from __future__ import annotations

from deepseek_export.backend.base import Backend, CutRunner, Limits
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.cpu_library import library_for
from deepseek_export.errors import DsxError


class OrtBackend(Backend):
    """任何 bundle 都能跑，除了 bfloat16：ONNX Runtime 的 CPU 没有 bfloat16 的算子。"""

    name = "ort"

    def prepared(self, bundle: Bundle) -> Bundle:
        """核对 dtype。

        Raises:
            DsxError: ``DSX-E321``，bfloat16 的只能建引擎。
        """
        if bundle.manifest.dtype not in self.limits(bundle).dtypes:
            raise DsxError(
                "DSX-E321",
                f"{bundle.path} 是 bfloat16，ONNX Runtime 的 CPU 没有 bfloat16 的算子",
                "先 dsx build，再在有 GPU 的机器上用 --backend trt（dsx verify 的 model、tokens 两级，dsx generate）；"
                "没有 GPU 就用 --dtype float16 再导出一份来校验：图与 pass 相同",
            )
        return bundle

    def limits(self, bundle: Bundle, graph: GraphEntry | None = None) -> Limits:
        return Limits(bundle.manifest.model.max_position_embeddings, grows=True)

    def open(
        self, bundle: Bundle, graph: GraphEntry, weights: BundleWeights, threads: int | None = None
    ) -> OrtRunner:
        """同 :meth:`Backend.open`。

        Raises:
            DsxError: ``DSX-E507`` / ``DSX-E508``，加载失败或不符合约定；``DSX-E115`` / ``DSX-E116``，权重有问题；``DSX-E520`` /
                ``DSX-E521`` C++ 算子库用不了；``DSX-E321`` bfloat16。
        """
        self.prepared(bundle)
        return OrtRunner(
            bundle.path / graph.file,
            threads=threads,
            max_positions=self.limits(bundle).max_positions,
            initializers=weights.arrays(graph.by_recipe),
            library=library_for(bundle.manifest.target),
        )

    def cut_runner(self, bundle: Bundle) -> CutRunner:
        # 到这里才导入：Polygraphy 只有 dsx compare 用。
        from deepseek_export.backend.ort.cut import run_file

        self.prepared(bundle)
        return CutRunner(lambda entry, capacity: None, run_file)


BACKEND = OrtBackend()
