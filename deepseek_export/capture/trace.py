"""把一个 PyTorch 块追踪成 ONNX 节点序列，权重是输入。

全程在 fake tensor 与 meta 设备上：不读、不折叠、不转置、不改名任何权重，追踪时间与模型的宽度、深度无关。
"""

from __future__ import annotations

import ast
import logging
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from deepseek_export.ops.registry import TRANSLATIONS

OPSET = 24

#: 动态维度的上界；超过它的请求在运行时之前就该被拒绝。
_MAX_DIM = 1 << 24

#: 追踪时动态维度的取值。互不相同且不为 0、1，避免 torch.export 把它们特化或等同起来。
_EXAMPLE_SIZES = {"B": 2, "S": 3, "T": 37, "L": 5, "N": 7, "K": 4, "K+1": 5}


@dataclass(frozen=True)
class Spec:
    """一个输入的形状与 dtype；字符串维度是动态的，``K+1`` 表示比 ``K`` 大 1。"""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def example(self) -> tuple[int, ...]:
        return tuple(_EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class TracedGraph:
    """追踪结果：一串节点，加上它们用到的常量。

    Attributes:
        nodes: 拓扑序的 NodeProto，没有子图。
        scopes: 与 ``nodes`` 等长，节点所在的模块路径（``self_attn.q_proj``），根为空串。
        inputs, outputs: 值的名字。
        constants: 名字 → 小常量（形状、频率等）。
        value_info: 名字 → 类型与形状，含输入、输出、中间值。
        program: 翻译成这些节点的 PyTorch 程序（已分解到 aten）。
        aten_values: 程序的节点名 → 这张图里的值名。exporter 用节点名给值命名；它为翻译而添的中间值（``val_3``）没有对应的节点。
    """

    nodes: tuple[onnx.NodeProto, ...]
    scopes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, onnx.TensorProto]
    value_info: Mapping[str, onnx.ValueInfoProto]
    program: torch.export.ExportedProgram
    aten_values: Mapping[str, str]

    @torch.no_grad()
    def evaluate(self, known: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """用 PyTorch 执行追踪到的程序，从 ``known`` 算到 ``outputs``。

        Args:
            known: 值名 → 张量；可以是输入（含权重），也可以是中间值，后者的上游就不再执行。
            outputs: 要算出的值。

        Returns:
            沿途每个值，名字是这张图里的值名。
        """
        interpreter = torch.fx.Interpreter(self.program.graph_module)
        nodes = {node.name: node for node in self.program.graph.nodes}
        named = {nodes[node]: value for node, value in self.aten_values.items()}
        env = interpreter.env
        env.update({node: known[value] for node, value in named.items() if value in known})
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER):
                env[nodes[spec.arg.name]] = self.program.constants[str(spec.target)]
        pending = [node for node, value in named.items() if value in outputs]
        needed: set[torch.fx.Node] = set()
        while pending:
            node = pending.pop()
            if node not in env and node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        for node in self.program.graph.nodes:
            if node in needed:
                env[node] = interpreter.run_node(node)
        return {value: env[node] for node, value in named.items() if isinstance(env.get(node), Tensor)}

    def renamed(self, rename: Callable[[str], str]) -> TracedGraph:
        """每个值名过一遍 ``rename``，得到一份互不共享的副本。"""
        nodes = []
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [rename(name) if name else "" for name in node.input]
            copy.output[:] = [rename(name) if name else "" for name in node.output]
            nodes.append(copy)
        constants, infos = {}, {}
        for name, tensor in self.constants.items():
            constants[rename(name)] = _named(tensor, rename(name))
        for name, info in self.value_info.items():
            infos[rename(name)] = _named(info, rename(name))
        return replace(
            self,
            nodes=tuple(nodes),
            inputs=tuple(map(rename, self.inputs)),
            outputs=tuple(map(rename, self.outputs)),
            constants=constants,
            value_info=infos,
            aten_values={node: rename(name) for node, name in self.aten_values.items()},
        )


def _named(proto, name: str):
    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.name = name
    return copy


class _Functional(nn.Module):
    """同一个模块，参数改作输入。"""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]

    def forward(self, *arguments: Tensor):
        count = len(arguments) - len(self.names)
        weights = dict(zip(self.names, arguments[count:], strict=True))
        return torch.func.functional_call(self.module, weights, arguments[:count])


class _Function(nn.Module):
    """把普通函数包成模块。"""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor):
        return self.function(*arguments)


@contextmanager
def _quiet():
    """exporter 会为可选依赖打警告；与用户无关。"""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(target: nn.Module | Callable, inputs: Mapping[str, Spec], outputs: Sequence[str]) -> TracedGraph:
    """追踪一个模块或函数。

    Args:
        target: 模块（参数在 meta 设备上）或张量函数。
        inputs: 数据输入，次序即调用次序。
        outputs: 输出的名字，个数必须与返回值相同。

    Returns:
        输入依次是 ``inputs`` 的名字，再是各参数的名字（``named_parameters`` 次序）。
    """
    module = target if isinstance(target, nn.Module) else _Function(target)
    functional = _Functional(module)
    specs = list(inputs.values())
    names = {d for spec in specs for d in spec.shape if isinstance(d, str)}
    dims = {d: torch.export.Dim(d, min=1, max=_MAX_DIM) for d in names if d.isalpha()}
    dims |= {d: dims[d.removesuffix("+1")] + 1 for d in names if d.endswith("+1")}
    dynamic = tuple({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs)
    dynamic += tuple({} for _ in functional.names)
    with _quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        example = [torch.empty(spec.example, dtype=spec.dtype) for spec in specs]
        example += [torch.empty(p.shape, dtype=p.dtype) for p in module.parameters()]
        program = torch.export.export(functional, tuple(example), dynamic_shapes=(dynamic,), strict=False)
    with _quiet():
        onnx_program = torch.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert onnx_program is not None
    graph = ir.to_proto(onnx_program.model).graph
    _name_dims(graph, specs)
    scopes = tuple(_scope(node) for node in onnx_program.model.graph)
    decomposed = onnx_program.exported_program
    assert decomposed is not None
    return _extract(graph, scopes, decomposed, [*inputs, *functional.names], list(outputs))


def _name_dims(graph: onnx.GraphProto, specs: Sequence[Spec]) -> None:
    """exporter 用的是内部符号（``s14``、``s14*s44``）；换回 B、S、T 这些名字。"""
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.input, specs, strict=False):
        for dim, name in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(name, str) and name.isalpha():
                symbols[dim.dim_param] = name
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda m: symbols.get(m[0], m[0]), dim.dim_param)


def _extract(
    proto: onnx.GraphProto,
    scopes: tuple[str, ...],
    program: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
) -> TracedGraph:
    """GraphProto → :class:`TracedGraph`，输入输出改成给定的名字，其余值的名字原样保留。"""
    names = {value.name: name for value, name in zip(proto.input, inputs, strict=True)}
    for value, name in zip(proto.output, outputs, strict=True):
        assert value.name not in names, f"块的输出不能直通：{name}"
        names[value.name] = name
    present = {value.name for value in proto.input} | {name for node in proto.node for name in node.output}
    infos = {info.name: info for info in (*proto.input, *proto.output, *proto.value_info)}
    graph = TracedGraph(
        nodes=tuple(proto.node),
        scopes=scopes,
        inputs=tuple(value.name for value in proto.input),
        outputs=tuple(value.name for value in proto.output),
        constants={tensor.name: _inline(tensor) for tensor in proto.initializer},
        value_info=infos,
        program=program,
        aten_values={
            node.name: value for node in program.graph.nodes if (value := _value_name(node)) in present
        },
    )
    reserved = {*inputs, *outputs}
    # 中间值碰巧与端口同名时让开（如 Cos 的输出名 cos，而端口 cos 是 Cast 之后的值）。
    return graph.renamed(lambda name: names.get(name) or (f"{name}_inner" if name in reserved else name))


def _value_name(node: torch.fx.Node) -> str:
    """exporter 给这个节点的值起的名字；``split`` 的各段由 torchlib 命名，其余就是节点名。"""
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, torch.fx.Node)
        if source.name.startswith("split"):
            return f"{source.name}_split_{index}"
    return node.name


def _inline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """统一成 raw_data，相同内容的常量才能逐字节比较。"""
    return numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)


def _scope(node: ir.Node) -> str:
    """exporter 记下的模块路径，去掉包装模块那一级。"""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    paths = [scope for scope in scopes[:-1] if scope == "module" or scope.startswith("module.")]
    return paths[-1].removeprefix("module").removeprefix(".") if paths else ""
