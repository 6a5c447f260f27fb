"""从 bundle 的模型里截出一段，单独在 ONNX Runtime 上运行（权重仍从 bundle 的文件里取）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
import onnxruntime as ort

from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.cpu_library import library_for
from deepseek_export.parity.tolerances import Dtype
from deepseek_export.runtime.cache import ort_value
from deepseek_export.runtime.graph import give_initializers, use_library

#: 从内存里的模型建 session 时，外部权重相对哪个目录。
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class ModelGraph:
    """bundle 里一张图，带每个值的类型。

    Args:
        bundle: bundle。
        file: 图的文件名；缺省是主模型。
    """

    def __init__(self, bundle: Bundle, file: str | None = None) -> None:
        self.folder = bundle.path
        self._library = library_for(bundle.manifest.target)
        self._manifest = bundle.manifest
        self._weights = BundleWeights(bundle)
        path = bundle.model_path if file is None else bundle.path / file
        self.model = onnx.shape_inference.infer_shapes(
            onnx.load(path, load_external_data=False), data_prop=True
        )

    @property
    def attention_dtype(self) -> Dtype:
        """注意力的结果按哪个 dtype 的容差比：一般是模型的 dtype；算子库把乘数舍入到 bfloat16 时是 bfloat16。"""
        manifest, library = self._manifest, self._library
        rounded = library is not None and library.rounds_to_bfloat16(manifest.cache.dtype)
        # 量化的容差已经比 bfloat16 宽。
        return "bfloat16" if rounded and manifest.quant is None else manifest.dtype

    @cached_property
    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def _values(self) -> dict[str, onnx.ValueInfoProto]:
        graph = self.model.graph
        return {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}

    @cached_property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def has_value(self, name: str) -> bool:
        """图里还有这个值吗（下沉可能把它融掉）。"""
        return name in self._producers or name in self._values

    def cut(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """截取从 ``inputs`` 到 ``outputs`` 的子图。

        Args:
            inputs: 允许作为子图输入的值；用不到的不会出现在结果里。
            outputs: 子图的输出。

        Raises:
            KeyError: 从 ``inputs`` 出发算不出 ``outputs``（dsx 的缺陷）。
        """
        allowed, needed, nodes, used = set(inputs), list(outputs), {}, set()
        seen: set[str] = set()
        while needed:
            name = needed.pop()
            if name in seen or not name:
                continue
            seen.add(name)
            if name in allowed or name in self._initializers:
                used.add(name)
                continue
            node = self._producers[name]
            nodes[id(node)] = node
            needed.extend(node.input)
        graph = onnx.helper.make_graph(
            [node for node in self.model.graph.node if id(node) in nodes],
            "cut",
            [self._values[name] for name in inputs if name in used],
            [self._values[name] for name in outputs],
            initializer=[tensor for name, tensor in self._initializers.items() if name in used],
        )
        cut = onnx.helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version
        )
        cut.functions.extend(self.model.functions)
        return cut

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], model: onnx.ModelProto | None = None
    ) -> list[np.ndarray]:
        """截取并运行一次。

        Args:
            feeds: 输入名 → 数组；多给的忽略。
            outputs: 要的值。
            model: 已经截好的子图（形状不同的多次运行可以共用）。
        """
        return self.session(model or self.cut(list(feeds), outputs))(feeds, outputs)

    def session(self, model: onnx.ModelProto):
        """子图 → 可反复调用的函数 ``(feeds, outputs) -> list[np.ndarray]``；不能要 bfloat16 的输出。"""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(self.folder.resolve()))
        initializers = self._weights.arrays(model)
        give_initializers(options, initializers)
        use_library(options, self._library)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        run_options = ort.RunOptions()
        run_options.log_severity_level = 4
        names = {value.name for value in session.get_inputs()}

        def call(feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
            # OrtValue 只借用 numpy 的内存：used 要活到运行结束。
            used = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in names}
            binding = session.io_binding()
            for name, array in used.items():
                binding.bind_ortvalue_input(name, ort_value(array))
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding, run_options)
            return [value.numpy() for value in binding.get_outputs()]

        return call
