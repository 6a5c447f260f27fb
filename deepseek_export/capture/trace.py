"""把一个 PyTorch 块追踪成 ONNX 节点序列，权重是输入。

全程在 fake tensor 与 meta 设备上：不读、不折叠、不转置、不改名任何权重，追踪时间与模型的宽度、深度无关。
"""

from __future__ import annotations

import ast
import functools
import hashlib
import logging
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek_export.capture.aten import AtenProgram
from deepseek_export.capture.translations import parsed_once
from deepseek_export.disk_cache import DiskCache
from deepseek_export.ops.registry import TRANSLATIONS

logger = logging.getLogger(__name__)

OPSET = 24

#: 动态维度的上界；超过它的请求在运行时之前就该被拒绝。
_MAX_DIM = 1 << 24

_SCOPE = "dsx.scope"

_CACHE = DiskCache("traces")

#: 追踪时动态维度的取值。互不相同且不为 0、1，避免 torch.export 把它们特化或等同起来。
_EXAMPLE_SIZES = {"B": 2, "S": 3, "T": 37, "L": 5, "N": 7, "K": 4, "K+1": 5}


#: 有名字的 ONNX 消息。
Proto = TypeVar("Proto", onnx.TensorProto, onnx.ValueInfoProto)


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
        nodes: 拓扑序的 NodeProto，没有子图，也没有 exporter 的附注。
        scopes: 与 ``nodes`` 等长，节点所在的模块路径（``self_attn.q_proj``），根为空串。
        inputs, outputs: 值的名字。
        constants: 名字 → 小常量（形状、频率等）。
        value_info: 名字 → 类型与形状，含输入、输出、中间值。
        retrace: 重新追踪一次，得到翻译成这些节点的 PyTorch 程序；磁盘缓存里只有 ONNX 这一侧。
    """

    nodes: tuple[onnx.NodeProto, ...]
    scopes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, onnx.TensorProto]
    value_info: Mapping[str, onnx.ValueInfoProto]
    retrace: Callable[[], AtenProgram] | None = field(default=None, compare=False, repr=False)

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
            constants[rename(name)] = named(tensor, rename(name))
        for name, info in self.value_info.items():
            infos[rename(name)] = named(info, rename(name))
        return replace(
            self,
            nodes=tuple(nodes),
            inputs=tuple(map(rename, self.inputs)),
            outputs=tuple(map(rename, self.outputs)),
            constants=constants,
            value_info=infos,
        )

    def to_bytes(self) -> bytes:
        """序列化成一个 GraphProto；模块路径写在节点的附注里。"""
        graph = onnx.GraphProto(
            node=self.nodes,
            input=[onnx.ValueInfoProto(name=name) for name in self.inputs],
            output=[onnx.ValueInfoProto(name=name) for name in self.outputs],
            initializer=self.constants.values(),
            value_info=self.value_info.values(),
        )
        for node, scope in zip(graph.node, self.scopes, strict=True):
            node.metadata_props.add(key=_SCOPE, value=scope)
        return graph.SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, content: bytes) -> TracedGraph:
        """:meth:`to_bytes` 的逆。"""
        graph = onnx.GraphProto.FromString(content)
        scopes = tuple(node.metadata_props[0].value for node in graph.node)
        for node in graph.node:
            node.ClearField("metadata_props")
        return cls(
            nodes=tuple(graph.node),
            scopes=scopes,
            inputs=tuple(value.name for value in graph.input),
            outputs=tuple(value.name for value in graph.output),
            constants={tensor.name: tensor for tensor in graph.initializer},
            value_info={info.name: info for info in graph.value_info},
        )


def named(proto: Proto, name: str) -> Proto:
    """改了名字的副本。"""
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


def trace(
    build: Callable[[], nn.Module | Callable],
    inputs: Mapping[str, Spec],
    outputs: Sequence[str],
    key: tuple[object, ...],
) -> TracedGraph:
    """追踪一个模块或函数；同样的 ``key``、输入、源码与库版本追踪过一次，就从磁盘缓存里取。

    Args:
        build: 造出要追踪的模块（参数在 meta 设备上）或张量函数。
        inputs: 数据输入，次序即调用次序。
        outputs: 输出的名字，个数必须与返回值相同。
        key: 造出来的东西由它完全决定，``repr`` 要能区分。

    Returns:
        输入依次是 ``inputs`` 的名字，再是各参数的名字（``named_parameters`` 次序）。
    """
    whole = repr((_environment(), key, list(inputs.items()), list(outputs)))
    digest = hashlib.sha256(whole.encode()).hexdigest()
    graph = _cached(digest, list(inputs), list(outputs))
    if graph is None:
        graph, _ = _trace(build(), inputs, outputs)
        _CACHE.put(digest, graph.to_bytes())
    return replace(graph, retrace=functools.cache(lambda: _trace(build(), inputs, outputs)[1]))


def _cached(digest: str, inputs: list[str], outputs: list[str]) -> TracedGraph | None:
    """缓存里的追踪结果；没有就是 ``None``，读得出却不成样子的也当作没有，记一笔，重新追踪会换掉它。"""
    known = _CACHE.get(digest)
    if known is None:
        return None
    try:
        graph = TracedGraph.from_bytes(known)
    except (DecodeError, IndexError) as error:
        logger.info("缓存的计算图 %s 读不了，重新捕获：%s", digest, error)
        return None
    if (list(graph.inputs[: len(inputs)]), list(graph.outputs)) != (inputs, outputs) or not graph.nodes:
        logger.info("缓存的计算图 %s 不是要的那一个，重新捕获", digest)
        return None
    return graph


@functools.cache
def _environment() -> str:
    """追踪结果还取决于什么：Python 与各库的版本，以及被追踪的和负责追踪的源码。"""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for folder in ("capture", "checkpoint", "ops", "reference"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    libraries = {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")}
    return f"{platform.python_version()} {libraries} {digest.hexdigest()}"


def _trace(
    target: nn.Module | Callable, inputs: Mapping[str, Spec], outputs: Sequence[str]
) -> tuple[TracedGraph, AtenProgram]:
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
    with _quiet(), parsed_once():
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
) -> tuple[TracedGraph, AtenProgram]:
    """GraphProto → :class:`TracedGraph`，输入输出改成给定的名字，其余值的名字原样保留。"""
    names = {value.name: name for value, name in zip(proto.input, inputs, strict=True)}
    for value, name in zip(proto.output, outputs, strict=True):
        assert value.name not in names, f"块的输出不能直通：{name}"
        names[value.name] = name
    infos = {info.name: info for info in (*proto.input, *proto.output, *proto.value_info)}
    graph = TracedGraph(
        nodes=tuple(proto.node),
        scopes=scopes,
        inputs=tuple(value.name for value in proto.input),
        outputs=tuple(value.name for value in proto.output),
        constants={tensor.name: _inline(tensor) for tensor in proto.initializer},
        value_info=infos,
    )
    for node in graph.nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    reserved = {*inputs, *outputs}
    # 中间值碰巧与端口同名时让开（如 Cos 的输出名 cos，而端口 cos 是 Cast 之后的值）。

    def rename(name: str) -> str:
        return names.get(name) or (f"{name}_inner" if name in reserved else name)

    present = {value.name for value in proto.input} | {name for node in proto.node for name in node.output}
    return graph.renamed(rename), AtenProgram.of(program, {name: rename(name) for name in present})


def _inline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """统一成 raw_data，相同内容的常量才能逐字节比较。"""
    return numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)


def _scope(node: ir.Node) -> str:
    """exporter 记下的模块路径，去掉包装模块那一级。"""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    paths = [scope for scope in scopes[:-1] if scope == "module" or scope.startswith("module.")]
    return paths[-1].removeprefix("module").removeprefix(".") if paths else ""
