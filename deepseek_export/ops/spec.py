"""一个算子的契约由什么组成：端口、类型变量、属性。各个算子在 :mod:`~deepseek_export.ops.table` 里。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

TypeVar = Literal["T", "C", "F", "W", "Q", "S", "I64", "I32", "F32", "F16", "U8", "I8"]

#: 类型变量 → 允许的 dtype。``C`` 是缓存 dtype，允许与计算 dtype ``T`` 不同（``mla.cache_dtype``、``dsa.index_cache_dtype``）；
#: ``F`` 是只有浮点的缓存（下沉到 TensorRT 之后的索引器与稀疏注意力）；``W`` 是权重的，``ort-cpu`` 的量化 bundle 里存成 int8 或 bfloat16；``Q`` 是有符号的码，或 FP8 的字节；
#: ``S`` 是码的 scale：整数的码与 ``T`` 相同，FP8 的是 float32。
TYPE_CONSTRAINTS: Mapping[TypeVar, tuple[str, ...]] = MappingProxyType(
    {
        "T": ("float32", "float16", "bfloat16"),
        "C": ("float32", "float16", "bfloat16", "int8"),
        "F": ("float32", "float16", "bfloat16"),
        "W": ("float32", "float16", "bfloat16", "int8"),
        "Q": ("int8", "int4"),
        "S": ("float32", "float16", "bfloat16"),
        "I64": ("int64",),
        "I32": ("int32",),
        "F32": ("float32",),
        "F16": ("float16",),
        "U8": ("uint8",),
        "I8": ("int8",),
    }
)


@dataclass(frozen=True, slots=True)
class Port:
    """算子的一个输入或输出：名字、类型变量、具名维度。"""

    name: str
    type: TypeVar
    dims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """算子的一个属性；TensorRT 插件字段只认 int32 / float32 / str，所以只有这三种。"""

    name: str
    kind: Literal["int", "float", "str"]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """一个算子的契约。

    Attributes:
        name: ONNX ``op_type``，也是 TensorRT 插件名。
        torch_name: ``torch.ops.dsx`` 下的名字。
        inputs: 次序与个数固定；插件不接受可选输入，权重一律走输入而不是属性。
        outputs: 次序与个数固定。
        attributes: 次序固定。
        doc: 一句话语义，写进 ``OpSchema``。
        aliases: 就地改写的：输出名 → 它与哪个输入是同一块内存。只有插件这样做，函数体给出新的值。
    """

    name: str
    torch_name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    doc: str
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def torch_schema(self) -> str:
        """``torch.library.define`` 用的签名，例如 ``mla_attention(Tensor q_nope, ..., float scale) -> (Tensor, Tensor)``。"""
        arguments = [f"Tensor {port.name}" for port in self.inputs]
        arguments += [f"{attribute.kind} {attribute.name}" for attribute in self.attributes]
        results = ", ".join("Tensor" for _ in self.outputs)
        return f"{self.torch_name}({', '.join(arguments)}) -> {f'({results})' if len(self.outputs) > 1 else results}"

    def find(self, name: str) -> tuple[Literal["input", "output"], int, Port]:
        """名为 ``name`` 的端口：是输入还是输出，第几个。

        Raises:
            KeyError: 没有这个端口。
        """
        for index, port in enumerate(self.inputs):
            if port.name == name:
                return "input", index, port
        for index, port in enumerate(self.outputs):
            if port.name == name:
                return "output", index, port
        raise KeyError(name)

    def dims(self, shapes: Sequence[Any]) -> dict[str, Any]:
        """各输入的形状 → 具名维的大小；几个输入都有的维取最先的。"""
        found: dict[str, Any] = {}
        for port, shape in zip(self.inputs, shapes, strict=True):
            for axis, name in enumerate(port.dims):
                found.setdefault(name, shape[axis])
        return found

    def types(self, values: Sequence[Any]) -> dict[TypeVar, Any]:
        """各输入的类型 → 类型变量的值；几个输入同一个变量的取最先的。"""
        return {port.type: value for port, value in reversed(list(zip(self.inputs, values, strict=True)))}

    def aliased(self) -> tuple[tuple[int, int], ...]:
        """:attr:`aliases` 的序号：第几个输出、第几个输入。"""
        return tuple((self.find(output)[1], self.find(given)[1]) for output, given in self.aliases)
