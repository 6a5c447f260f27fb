"""pass 的契约：就地改写一个 :class:`GraphModule`，如实报告改了什么、拒绝了什么。"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NoReturn

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.logger import G_LOGGER

from deepseek_export.capture import CapturedModel
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.ops.mla_attention import MlaForm
from deepseek_export.ops.table import DOMAIN, OPSET_VERSION
from deepseek_export.records import ModelDtype, OpSite, PassResult

MICROSOFT = "com.microsoft"
IR_VERSION = 11

#: TensorRT 的张量至多 2^31-1 个元素；onnxruntime 的一些 kernel 也用 32 位下标。
MAX_ELEMENTS = (1 << 31) - 1

#: 非标准域的 opset 版本；只在用到时声明。
DOMAIN_VERSIONS = {DOMAIN: OPSET_VERSION, MICROSOFT: 1}


@dataclass
class GraphModule:
    """pass 改写的对象；与捕获结果互不共享可变状态。

    Attributes:
        graph: 主图。输入依次是 I/O 契约的输入、权重。
        functions: ``op_type`` → 函数体。
        weights: 权重输入名 → 配方，次序与 ``graph.inputs`` 一致。
        dtype: 计算 dtype。
        config: 模型配置。
        sites: 捕获时每个 ``dsx::`` 节点的位置。
        quantized: 已经量化的权重，按量化之前的名字；与词嵌入共享的 lm_head 记作 ``lm_head.weight``。
        mla_form: 方案里的 ``mla.form``。
        role, layers, verify: 见 :class:`~deepseek_export.capture.CapturedModel`。
        max_elements: 一个权重至多多少个元素。
        int4: 一个浮点权重在检查点里是不是 4 位的、怎么排；不是为 ``None``。
    """

    graph: gs.Graph
    functions: dict[str, onnx.FunctionProto]
    weights: dict[str, Recipe]
    dtype: ModelDtype
    config: ModelConfig
    sites: tuple[OpSite, ...]
    role: Literal["main", "draft"]
    layers: tuple[int, ...]
    verify: Literal["greedy", "rejection"] | None
    mla_form: MlaForm = "auto"
    max_elements: int = MAX_ELEMENTS
    quantized: set[str] = field(default_factory=set)
    int4: Callable[[Recipe], Int4Layout | None] = lambda recipe: None

    @classmethod
    def from_captured(
        cls,
        captured: CapturedModel,
        config: ModelConfig,
        dtype: ModelDtype,
        mla_form: MlaForm = "auto",
        max_elements: int = MAX_ELEMENTS,
    ) -> GraphModule:
        """由捕获结果建立；``captured`` 之后不会被改动。"""
        # numpy 没有的类型（bfloat16）它保留 ONNX 的编号，这正是我们要的，不必提醒用户。
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            graph = gs.import_onnx(captured.proto)
        return cls(
            graph,
            dict(captured.functions),
            dict(captured.weights),
            dtype,
            config,
            tuple(captured.sites),
            captured.role,
            captured.layers,
            captured.verify,
            mla_form,
            max_elements,
        )

    def find(self, op_type: str, domain: str = DOMAIN) -> list[gs.Node]:
        """主图里某个算子的全部节点，按图的次序。"""
        return [node for node in self.graph.nodes if node.op == op_type and (node.domain or "") == domain]

    def oversized(self) -> list[str]:
        """一个张量装不下的权重。"""
        return [name for name, recipe in self.weights.items() if math.prod(recipe.shape) > self.max_elements]

    def replace(self, old: gs.Node, new: Sequence[gs.Node]) -> None:
        """用 ``new`` 顶替 ``old`` 在节点表里的位置；``new`` 为空即删除。"""
        index = next(i for i, node in enumerate(self.graph.nodes) if node is old)
        old.inputs.clear()
        old.outputs.clear()
        self.graph.nodes[index : index + 1] = list(new)

    def reroute(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """读 ``old`` 的节点改读 ``new``；图的输出不动。"""
        for reader in list(old.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is old:
                    reader.inputs[index] = new

    def drop_unused(self) -> None:
        """去掉结果没有人读、也不是图的输出的节点。"""
        outputs = {id(tensor) for tensor in self.graph.outputs}
        for node in reversed(list(self.graph.nodes)):
            if not any(tensor.outputs or id(tensor) in outputs for tensor in node.outputs):
                self.replace(node, [])

    def constant(self, name: str, value: np.ndarray) -> gs.Constant:
        """全图共用的具名常量；同名的取已有的那一个。"""
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if tensor.name == name:
                    return tensor
        return gs.Constant(name, value)

    def add_weight(self, name: str, recipe: Recipe, before: gs.Variable) -> gs.Variable:
        """登记一个新权重，排在权重输入 ``before`` 之前；已登记过就取已有的。"""
        position = 0
        for index, tensor in enumerate(self.graph.inputs):
            if tensor.name == name:
                return tensor
            if tensor is before:
                position = index
        variable = gs.Variable(name, DTYPES[recipe.dtype].numpy, list(recipe.shape))
        self.graph.inputs.insert(position, variable)
        self.weights[name] = recipe
        self._sort_weights()
        return variable

    def prune(self) -> None:
        """去掉没有节点消费的权重（连同配方）和没有节点调用的函数体。"""
        used = {tensor.name for node in self.graph.nodes for tensor in node.inputs}
        self.graph.inputs = [t for t in self.graph.inputs if t.name in used or t.name not in self.weights]
        self._sort_weights()
        called = {node.op for node in self.graph.nodes if node.domain == DOMAIN}
        # 函数体之间可以互相调用，取闭包。
        while (
            more := {
                node.op_type
                for op in called & self.functions.keys()
                for node in walk(self.functions[op].node)
                if node.domain == DOMAIN
            }
            - called
        ):
            called |= more
        self.functions = {op: body for op, body in self.functions.items() if op in called}

    def to_proto(self) -> onnx.ModelProto:
        """导出成 ModelProto；先 :meth:`prune`。同样的模块总是得到逐字节相同的结果。"""
        self.prune()
        main = helper.make_opsetid("", self.graph.opset)
        model = gs.export_onnx(self.graph, opset_imports=[main])
        model.ir_version, model.producer_name = IR_VERSION, "dsx"
        model.functions.extend(self.functions.values())
        nodes = [*walk(model.graph.node)]
        for function in model.functions:
            nodes.extend(walk(function.node))
        for node in nodes:
            # exporter 写属性的次序随 hash 种子变。
            ordered = sorted(node.attribute, key=lambda attribute: attribute.name)
            node.ClearField("attribute")
            node.attribute.extend(ordered)
        used = {node.domain for node in nodes}
        model.opset_import.extend(
            helper.make_opsetid(domain, version)
            for domain, version in DOMAIN_VERSIONS.items()
            if domain in used
        )
        return model

    def _sort_weights(self) -> None:
        inputs = [tensor.name for tensor in self.graph.inputs]
        self.weights = {name: self.weights[name] for name in inputs if name in self.weights}


def walk(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """节点连同子图里的节点。"""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from walk(subgraph.node)


def read_from(node: onnx.NodeProto, old: str, new: str) -> None:
    """节点（及其子图）里读 ``old`` 的地方改读 ``new``。"""
    node.input[:] = [new if name == old else name for name in node.input]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            read_from(inner, old, new)


class PassError(Exception):
    """pass 自身的缺陷；不是用户错误，traceback 原样保留。"""


class Pass(ABC):
    """就地改写一个 :class:`GraphModule`，可以重复运行（第二次 ``changed=False``）。

    生命周期 ``requires`` → ``call`` → ``ensures``。不论哪个 pass，图的输出和 I/O 契约的输入都必须原样保留。
    """

    name: ClassVar[str]

    def requires(self, module: GraphModule) -> None:
        """前置条件，不成立则抛 :class:`PassError`。"""

    @abstractmethod
    def call(self, module: GraphModule) -> PassResult:
        """改写。"""

    def ensures(self, module: GraphModule) -> None:
        """后置条件，不成立则抛 :class:`PassError`。"""

    def __call__(self, module: GraphModule, before: Sequence[str] = ()) -> PassResult:
        """运行整个生命周期。

        Args:
            module: 就地改写。
            before: 之前跑过的 pass，只用于报错。

        Raises:
            DsxError: pass 抛出的用户错误，补上 pass 名。
            PassError: 其余任何异常，写明 pass 名、阶段和之前跑过的 pass。
        """
        contract = _contract(module)
        self._stage("requires", lambda: self.requires(module), before)
        result: PassResult = self._stage("call", lambda: self.call(module), before)
        if result.changed:
            module.prune()
        if result.changed != (result.count > 0):
            self._fail("ensures", f"changed={result.changed} 而 count={result.count}", before)
        if _contract(module) != contract:
            self._fail("ensures", f"I/O 契约变了：{contract} → {_contract(module)}", before)
        self._stage("ensures", lambda: self.ensures(module), before)
        return result

    def _stage(self, stage: str, run: Callable, before: Sequence[str]):
        try:
            return run()
        except DsxError as error:
            what = f"{error.what}（pass {self.name}，{_history(before)}）"
            raise DsxError(error.code, what, error.todo) from error
        except Exception as error:
            self._fail(stage, str(error), before, error)

    def _fail(
        self, stage: str, problem: str, before: Sequence[str], cause: Exception | None = None
    ) -> NoReturn:
        raise PassError(f"pass {self.name} 在 {stage} 阶段失败，{_history(before)}：{problem}") from cause


def _contract(module: GraphModule) -> tuple[list[str], list[str]]:
    inputs = [tensor.name for tensor in module.graph.inputs if tensor.name not in module.weights]
    return inputs, [tensor.name for tensor in module.graph.outputs]


def _history(before: Sequence[str]) -> str:
    return f"之前跑过：{'、'.join(before)}" if before else "它是第一个 pass"
