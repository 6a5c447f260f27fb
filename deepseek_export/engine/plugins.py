"""``IPluginV3`` 插件：由算子契约表生成，Python 写成，建引擎与运行用同一个类。

建引擎时 ``configure_plugin`` 知道了静态维度与 dtype，按目标 SM 编译出
:data:`~deepseek_export.kernels.program.Program`，序列化成两个字段 ``program`` 与 ``image``；
运行时由这两个字段还原，``enqueue`` 只启动 kernel。同名的 C++ 插件（``plugins/tensorrt``）读同样的字段。
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.kernels.codes import E4M3, CodeFormat
from deepseek_export.kernels.compile import compile_table
from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.index_topk_launch import index_topk_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.latent_cache_update_launch import latent_cache_update_launch
from deepseek_export.kernels.launcher import Launcher
from deepseek_export.kernels.program import IMAGE_FIELD, PROGRAM_FIELD, LaunchTable, Program
from deepseek_export.kernels.quantized_linear_launch import quantized_linear_launch
from deepseek_export.kernels.quantized_swiglu_launch import quantized_swiglu_launch
from deepseek_export.kernels.sparse_latent_attention_launch import sparse_latent_attention_launch
from deepseek_export.kernels.table import KernelSpec
from deepseek_export.ops.spec import TYPE_CONSTRAINTS, OpSpec, TypeVar
from deepseek_export.ops.table import (
    INDEX_TOPK,
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    MOE_EXPERTS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    QUANTIZED_LINEAR,
    QUANTIZED_MOE_EXPERTS,
    SPARSE_LATENT_ATTENTION,
)

#: 契约里的输出维 → 给出它的属性；其余的维都能从输入里找到。
_ATTRIBUTE_DIMS: Mapping[str, str] = MappingProxyType({"r": "kv_lora_rank", "ks": "topk"})

_FIELD_KINDS = {"int": ("INT32", np.int32), "float": ("FLOAT32", np.float32)}


Tabulate = Callable[
    [int, Mapping[str, int], Mapping[TypeVar, Any], Mapping[str, Any]], LaunchTable[KernelSpec]
]


def _latent_attention(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    r, scale = attributes["kv_lora_rank"], attributes["scale"]
    return latent_attention_launch(sm, dims["H"], r, dims["r+dr"] - r, scale, dtypes["T"], dtypes["C"])


def _latent_cache_update(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    return latent_cache_update_launch(sm, dims["r"], dims["dr"], dtypes["T"])


def _index_topk(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    return index_topk_launch(sm, dims["Hi"], dims["di"], attributes["topk"], dtypes["T"], dtypes["F"])


def _sparse_latent_attention(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    r, scale = attributes["kv_lora_rank"], attributes["scale"]
    return sparse_latent_attention_launch(
        sm, dims["H"], r, dims["r+dr"] - r, dims["ks"], scale, dtypes["T"], dtypes["F"]
    )


def _moe_experts(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    return grouped_swiglu_launch(sm, dims["E"], dims["k"], dims["D"], dims["I"], dtypes["T"])


def _code_format(dtypes, attributes) -> CodeFormat:
    codes = E4M3 if attributes["e4m3"] else dtypes["Q"]
    return CodeFormat(codes, attributes["block_size"], attributes["block_rows"])


def _quantized_moe_experts(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    shape = (dims["E"], dims["k"], dims["D"], dims["I"])
    return quantized_swiglu_launch(sm, *shape, dtypes["T"], _code_format(dtypes, attributes))


def _quantized_linear(sm, dims, dtypes, attributes) -> LaunchTable[KernelSpec]:
    return quantized_linear_launch(sm, dims["N"], dims["K"], dtypes["T"], _code_format(dtypes, attributes))


#: 插件核 → 由静态的具名维、类型变量与属性得到启动表。
LAUNCH_TABLES: Mapping[str, Tabulate] = MappingProxyType(
    {
        LATENT_ATTENTION.name: _latent_attention,
        LATENT_CACHE_UPDATE.name: _latent_cache_update,
        INDEX_TOPK.name: _index_topk,
        SPARSE_LATENT_ATTENTION.name: _sparse_latent_attention,
        MOE_EXPERTS.name: _moe_experts,
        QUANTIZED_MOE_EXPERTS.name: _quantized_moe_experts,
        QUANTIZED_LINEAR.name: _quantized_linear,
    }
)
#: 有插件的算子。
PLUGIN_OPS: tuple[OpSpec, ...] = (
    LATENT_ATTENTION,
    LATENT_CACHE_UPDATE,
    INDEX_TOPK,
    SPARSE_LATENT_ATTENTION,
    MOE_EXPERTS,
    QUANTIZED_MOE_EXPERTS,
    QUANTIZED_LINEAR,
)


@dataclass(eq=False)
class BuildTarget:
    """正在建或正在运行的引擎。

    Attributes:
        sm: 它的 SM。
        calls: TensorRT 依次调用了哪些插件方法。
        failures: 插件方法里抛出的异常；TensorRT 只会返回空指针，由建引擎的一方取出来（:meth:`raise_failure`）。
    """

    sm: int
    calls: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def raise_failure(self, what: str) -> None:
        """插件里抛过异常就抛出来；用户错误、中断原样，其余包成 ``DSX-E916``。"""
        if not self.failures:
            return
        error = self.failures[0]
        if isinstance(error, DsxError) or not isinstance(error, Exception):
            raise error
        raise DsxError(
            "DSX-E916",
            f"{what}的插件抛出 {type(error).__name__}：{error}",
            "这是插件的缺陷：请附上这段文字和 dsx doctor 的输出报告",
        ) from error


_targets: list[BuildTarget] = []


@contextmanager
def building_for(sm: int) -> Iterator[BuildTarget]:
    """期间插件为 ``sm`` 编译 kernel，调用与异常都记下来。"""
    target = BuildTarget(sm)
    _targets.append(target)
    try:
        yield target
    finally:
        _targets.remove(target)


def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """记下调用；抛出的异常先记下来再抛，因为 TensorRT 只会说「插件出错」。"""

    @functools.wraps(method)
    def call(*arguments: Any) -> Any:
        for target in _targets:
            target.calls.append(method.__name__)
        try:
            return method(*arguments)
        except BaseException as error:
            for target in _targets:
                target.failures.append(error)
            raise

    return call


def contained(fallback: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """同 :func:`recorded`，但不让异常进到 TensorRT 里，改为返回 ``fallback``：异常穿过这几个方法会破坏它的堆，整个进程中止。

    建引擎的一方看到 ``failures`` 不为空，就丢掉建出来的东西。
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        safe = recorded(method)

        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            try:
                return safe(*arguments)
            except BaseException:
                return fallback

        return call

    return decorate


@functools.cache
def registered_creators(trt: Any) -> Mapping[str, Any]:
    """登记全部插件（每个进程一次）；返回算子名 → creator。"""
    made = {}
    for spec in PLUGIN_OPS:
        made[spec.name] = make_creator(trt, spec)
        if not trt.get_plugin_registry().register_creator(made[spec.name], PLUGIN_NAMESPACE):
            raise DsxError(
                "DSX-E916",
                f"TensorRT 不接受插件 {spec.name} 的登记",
                "同名的插件已由别的库登记：不要同时加载 C++ 插件与 Python 插件",
            )
    return MappingProxyType(made)


def make_creator(trt: Any, spec: OpSpec) -> Any:
    """契约表的一行 → ``IPluginCreatorV3One``。"""

    class Creator(trt.IPluginCreatorV3One):
        """建引擎时字段是节点属性；反序列化时是 ``program`` 与 ``image``。"""

        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_namespace, self.plugin_version = (
                spec.name,
                PLUGIN_NAMESPACE,
                PLUGIN_VERSION,
            )
            kinds = {a.name: getattr(trt.PluginFieldType, _FIELD_KINDS[a.kind][0]) for a in spec.attributes}
            fields = [trt.PluginField(name, np.array([]), kind) for name, kind in kinds.items()]
            self.field_names = trt.PluginFieldCollection(fields)

        @recorded
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {entry.name: entry.data for entry in fields}
            if phase == trt.TensorRTPhase.RUNTIME:
                program = Program.from_text(_bytes(given[PROGRAM_FIELD]).decode(), _bytes(given[IMAGE_FIELD]))
                return plugin_class(trt, spec)({}, program)
            attributes = {}
            for attribute in spec.attributes:
                value = np.asarray(given[attribute.name]).reshape(-1)[0]
                attributes[attribute.name] = value.item()
            return plugin_class(trt, spec)(attributes, None)

    return Creator()


def _bytes(data: Any) -> bytes:
    """字段的内容：CHAR 读出来是字符串或字节，UNKNOWN 是数组。"""
    if isinstance(data, str):
        return data.encode()
    return data if isinstance(data, bytes) else np.asarray(data).tobytes()


@functools.cache
def plugin_class(trt: Any, spec: OpSpec) -> type:
    """契约表的一行 → ``IPluginV3`` 的类。"""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    dtypes = {getattr(trt, name): name for allowed in TYPE_CONSTRAINTS.values() for name in allowed}

    class Plugin(*bases):  # type: ignore[misc]  # 基类随发行而定
        """一个插件节点。"""

        def __init__(self, attributes: dict[str, Any], program: Program | None) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = (
                spec.name,
                PLUGIN_NAMESPACE,
                PLUGIN_VERSION,
            )
            self.num_outputs = len(spec.outputs)
            self.attributes, self.program = attributes, program
            self.launcher: Launcher | None = None

        def clone(self) -> Plugin:
            copy = Plugin(self.attributes, self.program)
            copy.launcher = self.launcher
            return copy

        def get_capability_interface(self, kind: Any) -> Plugin:
            return self

        @recorded
        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            known = spec.types(types)
            # 输入里没有的类型变量只容一种 dtype（indices、counts）。
            return [
                known[port.type] if port.type in known else getattr(trt, TYPE_CONSTRAINTS[port.type][0])
                for port in spec.outputs
            ]

        @recorded
        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            known = spec.dims(inputs) | {
                dim: builder.constant(self.attributes[attribute])
                for dim, attribute in _ATTRIBUTE_DIMS.items()
                if attribute in self.attributes
            }
            made = []
            for port in spec.outputs:
                dims = trt.DimsExprs(len(port.dims))
                for axis, name in enumerate(port.dims):
                    one, *more = (known[part] for part in name.split("*"))
                    for other in more:
                        one = builder.operation(trt.DimensionOperation.PROD, one, other)
                    dims[axis] = one
                made.append(dims)
            return made

        @recorded
        def supports_format_combination(self, position: int, descriptions: Any, num_inputs: int) -> bool:
            return bool(descriptions[position].desc.format == trt.TensorFormat.LINEAR)

        @contained(None)
        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            dims = spec.dims([tuple(entry.desc.dims) for entry in inputs])
            types = spec.types([dtypes.get(entry.desc.type, str(entry.desc.type)) for entry in inputs])
            self.program = compile_table(
                LAUNCH_TABLES[spec.name](_targets[-1].sm, dims, types, self.attributes)
            )

        @contained(0)
        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            assert self.program is not None
            return self.program.workspace([tuple(entry.max) for entry in inputs])

        @contained(trt.PluginFieldCollection([]))
        def get_fields_to_serialize(self) -> Any:
            assert self.program is not None
            # PluginField 只借用内存：TensorRT 在本方法返回之后才来读，字节与字段都要活得比它久。
            self.serialized = (
                np.frombuffer(self.program.to_text().encode(), np.int8),
                np.frombuffer(self.program.image, np.int8),
            )
            text, image = self.serialized
            self.fields = trt.PluginFieldCollection(
                [
                    trt.PluginField(PROGRAM_FIELD, text, trt.PluginFieldType.CHAR),
                    trt.PluginField(IMAGE_FIELD, image, trt.PluginFieldType.UNKNOWN),
                ]
            )
            return self.fields

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """只有一种 tactic。"""

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            """形状在 ``enqueue`` 时给出。"""

        @contained(None)
        def attach_to_context(self, context: Any) -> Plugin:
            attached = self.clone()
            # 装载 cubin 会分配，所以在这里做完；enqueue 只启动，可以录进 CUDA graph。
            attached.loaded()
            return attached

        @recorded
        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            shapes = tuple(tuple(entry.dims) for entry in input_desc)
            self.loaded().enqueue(shapes, inputs, outputs, workspace, stream)

        def loaded(self) -> Launcher:
            """装载好的程序；TensorRT 没有先调 ``attach_to_context`` 时在第一次 ``enqueue`` 装载。"""
            if self.launcher is None:
                assert self.program is not None
                self.launcher = Launcher(self.program)
            return self.launcher

    return Plugin
