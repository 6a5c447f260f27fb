"""从 bundle 的模型里截出一段，单独在 ONNX Runtime 上运行（权重仍从 bundle 的文件里取）。"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deepseek_export.backend.ort.cut import Call, open_model
from deepseek_export.backend.ort.session import SessionSettings
from deepseek_export.bundle import Bundle, BundleWeights, Manifest
from deepseek_export.bundle.graph import external_location
from deepseek_export.capture.trace import named
from deepseek_export.checkpoint.weight_only import unpacked_int4
from deepseek_export.cpu_library import library_for
from deepseek_export.parity.arrays import widened
from deepseek_export.parity.tolerances import Dtype, coarser

#: 断开之后，由外面喂的那一份值的名字前缀。
_FED = "pytorch/"


def attention_dtype(manifest: Manifest) -> Dtype:
    """注意力的结果按哪个 dtype 的容差比：模型的 dtype，与算子库把乘数舍入到的 dtype，取宽的。"""
    library = library_for(manifest.target)
    # 量化的容差已经比 bfloat16 宽。
    if library is None or manifest.quant is not None:
        return manifest.dtype
    return coarser(manifest.dtype, library.factors(manifest.cache.dtype))


class ModelGraph:
    """bundle 里一张图，带每个值的类型。

    Args:
        bundle: bundle。
        file: 图的文件名。
        model: 代替文件内容的图，例如下沉过的；外部权重的位置同文件里的。
    """

    def __init__(self, bundle: Bundle, file: str, model: onnx.ModelProto | None = None) -> None:
        self.folder: Path = bundle.path
        self._library = library_for(bundle.manifest.target)
        self._weights = BundleWeights(bundle)
        model = model or onnx.load(bundle.path / file, load_external_data=False)
        self.model = onnx.shape_inference.infer_shapes(model, data_prop=True)

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """值名 → 产生它的节点。"""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def values(self) -> dict[str, onnx.ValueInfoProto]:
        """值名 → 类型与形状。"""
        graph = self.model.graph
        return {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """权重与常量；数据在外部文件里的不读。"""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def array(self, name: str) -> np.ndarray:
        """一个权重或常量的内容；按引用的 bundle 里没有现成字节的，按配方生成。"""
        tensor = self.initializers[name]
        location = external_location(tensor)
        if location is None:
            return numpy_helper.to_array(tensor)
        made = self._weights.arrays([name])
        if name in made:
            return made[name]
        # 不用 onnx 自己的读法：它拒绝有多个硬链接的文件，而按引用的权重正是硬链接
        offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        count = int(np.prod(shape, dtype=np.int64))
        if tensor.data_type == TensorProto.INT4:
            packed = np.fromfile(self.folder / location, np.uint8, count // 2, offset=offset)
            return unpacked_int4(packed).reshape(shape)
        return np.fromfile(self.folder / location, dtype, count, offset=offset).reshape(shape)

    def upstream(self, outputs: Sequence[str], stop: Collection[str]) -> list[onnx.NodeProto]:
        """从 ``stop`` 算到 ``outputs`` 要经过的节点，按图里的次序；``outputs`` 自己总要算，即使它也在 ``stop`` 里。

        Raises:
            KeyError: 从 ``stop`` 出发算不出 ``outputs``（dsx 的缺陷）。
        """
        known = {*stop, *self.initializers}
        found: dict[int, onnx.NodeProto] = {}
        pending = [self.producers[name] for name in outputs]
        while pending:
            node = pending.pop()
            if id(node) in found:
                continue
            found[id(node)] = node
            pending += [self.producers[name] for name in node.input if name and name not in known]
        return [node for node in self.model.graph.node if id(node) in found]

    def cut(self, inputs: Collection[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """截取从 ``inputs`` 到 ``outputs`` 的子图，在 ``inputs`` 处断开。

        一个值可以既是断点又是输出：下游用外面喂的 ``pytorch/<名字>``，输出仍由它自己的节点算出。于是一次就能把相邻的许多块
        各自单独跑完（teacher forcing），上游的错误不会传到下游。bfloat16 的输入输出在边上转成 float32（无损），因为 numpy 没有
        bfloat16。

        Args:
            inputs: 断开的值；用不到的不会出现在结果里。
            outputs: 子图的输出。
        """
        model = helper.make_model(
            onnx.GraphProto(name="cut"),
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
        )
        model.functions.extend(self.model.functions)
        graph = model.graph
        graph.node.extend(self.upstream(outputs, inputs))
        used = {name for node in graph.node for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        fed = {name: _FED + name for name in inputs if name in used and name in outputs}
        graph.input.extend(named(self.values[name], fed.get(name, name)) for name in inputs if name in used)
        graph.output.extend(self.values[name] for name in outputs)
        for node in graph.node:
            node.input[:] = [fed.get(name, name) for name in node.input]
        _widen_bfloat16(graph)
        return model

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """截取并运行一次。

        Args:
            feeds: 输入名 → 数组；多给的忽略。
            outputs: 要的值。
        """
        return self.session(self.cut(list(feeds), outputs))(feeds, outputs)

    def session(self, model: onnx.ModelProto) -> Call:
        """截好的子图 → 可反复调用的函数 ``(feeds, outputs) -> list[np.ndarray]``。"""
        settings = SessionSettings(
            initializers=self._weights.arrays(tensor.name for tensor in model.graph.initializer),
            library=self._library,
            folder=self.folder,
        )
        run = open_model(model.SerializeToString(), settings)
        return lambda feeds, outputs: run(feeds_for(model, feeds), outputs)


def feeds_for(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``cut`` 出来的模型的输入：按它的输入名挑出来，bfloat16 转成 float32。"""
    names = [value.name for value in model.graph.input]
    return {name: widened(feeds[name.removeprefix(_FED)]) for name in names}


def _widen_bfloat16(graph: onnx.GraphProto) -> None:
    """输入输出里的 bfloat16 换成 float32，名字不变；图里面仍是 bfloat16。"""
    narrow = TensorProto.BFLOAT16
    inputs = {v.name: f"{v.name}/bfloat16" for v in graph.input if v.type.tensor_type.elem_type == narrow}
    outputs = {v.name: f"{v.name}/bfloat16" for v in graph.output if v.type.tensor_type.elem_type == narrow}
    for node in graph.node:
        node.input[:] = [inputs.get(name) or outputs.get(name, name) for name in node.input]
        node.output[:] = [outputs.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output):
        if value.name in inputs or value.name in outputs:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    before = [helper.make_node("Cast", [wide], [name], to=narrow) for wide, name in inputs.items()]
    after = [helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT) for wide, name in outputs.items()]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
