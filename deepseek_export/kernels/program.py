"""一个算子在一种 SM 上的启动表：用哪些 kernel，启动它们的次序、网格、参数。

:class:`LaunchTable` 里的 kernel 先是待编译的（:class:`~deepseek_export.kernels.table.KernelSpec`），编译之后是机器码
（:class:`CompiledKernel`），其余不变；编译好的就是 :data:`Program`。这里不依赖 Triton、torch 或 CUDA。

TensorRT 插件把程序序列化成两个字段：:data:`PROGRAM_FIELD`（:meth:`LaunchTable.to_text`，逐行的文本）与 :data:`IMAGE_FIELD`（各 kernel 的
cubin 首尾相接）。Python 插件用 :meth:`LaunchTable.bind` 得到每次启动的参数，C++ 插件（``plugins/tensorrt``）解析同一份文本。

文本格式（每行一条，空格分隔；算式见 :mod:`~deepseek_export.kernels.expression`）::

    dsx-program 2
    op <算子> <sm>
    input <dtype> <维> ...        维是整数（必须相等）或符号（首次出现时取值，之后必须相等）
    output <dtype> <维> ...
    alias <输出> <输入>           序号；两者的地址必须相同
    variant <算式>                非零则选用；依次看，取第一个
    workspace <算式>              字节数，随每个尺寸单调不减
    launch <入口> <线程数> <动态共享内存> <scratch 指针数> <偏移> <长度>
    grid <x> ; <y> ; <z>          有一维是 0 就不启动
    argument input|output <序号> | workspace <偏移> | int32 <算式> | float32 <数>

算式里的符号是各输入的维，与 :data:`SM_COUNT`。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from deepseek_export.kernels.expression import Expression

#: 插件序列化的两个字段的名字。
PROGRAM_FIELD = "program"
IMAGE_FIELD = "image"

#: 当前设备的 SM 个数，算式里的符号；装载之后才知道，所以 ``when`` 与 ``workspace`` 不用它。
SM_COUNT = "sms"

#: 张量与 workspace 的地址按多少字节对齐；kernel 按它编译（128 位的拷贝），没有对齐的地址不得启动。
POINTER_ALIGNMENT = 16

_HEADER = "dsx-program 2"

#: kernel：待编译的，或编译好的。
K = TypeVar("K")
#: 尺寸：算式，或代入之后的整数。
N = TypeVar("N")
_Other = TypeVar("_Other")


@dataclass(frozen=True, slots=True)
class Tensor:
    """插件的一个输入或输出。

    Attributes:
        dtype: ``float16``、``bfloat16``、``float32``、``int32``、``int64``、``int8``、``int4``。
        dims: 每维一个记号：十进制整数，或符号名。
    """

    dtype: str
    dims: tuple[str, ...]


class Argument(NamedTuple, Generic[N]):
    """kernel 的一个参数。

    Attributes:
        kind: 张量指针（``input``、``output``）、workspace 里的指针、标量。
        value: ``input``/``output`` 的序号；``workspace`` 的字节偏移；``int32`` 的值；``float32`` 的值。
    """

    kind: Literal["input", "output", "workspace", "int32", "float32"]
    value: int | float | N

    def __str__(self) -> str:
        return f"{self.kind} {self.value!r}" if isinstance(self.value, float) else f"{self.kind} {self.value}"


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """一个编译好的 kernel。

    Attributes:
        entry: cubin 里的入口名。
        cubin: 机器码。
        threads: 每个线程块的线程数。
        shared: 动态共享内存字节数；超过 48 KiB 时启动前须设 ``MAX_DYNAMIC_SHARED_SIZE_BYTES``。
        scratch: Triton 在末尾追加的 scratch 指针个数；dsx 的 kernel 不用 scratch，一律传空指针。
    """

    entry: str
    cubin: bytes
    threads: int
    shared: int
    scratch: int


@dataclass(frozen=True, slots=True)
class Launch(Generic[K, N]):
    """一次启动。

    Attributes:
        kernel: 启动谁。
        grid: x、y、z；代入尺寸之前是算式。
        arguments: 次序与 kernel 的形参一致（不含编译期常数与 scratch）。
    """

    kernel: K
    grid: tuple[N, N, N]
    arguments: tuple[Argument[N], ...]


@dataclass(frozen=True, slots=True)
class Variant(Generic[K]):
    """适用于一段尺寸的一串启动。

    Attributes:
        when: 非零则适用。
        workspace: 够用的字节数；随每个尺寸单调不减，所以按最大尺寸分配的 workspace 对更小的问题也够。
        launches: 依次在同一个流上启动。
    """

    when: Expression
    workspace: Expression
    launches: tuple[Launch[K, Expression], ...]


@dataclass(frozen=True)
class LaunchTable(Generic[K]):
    """见模块说明。

    Attributes:
        op: 算子名。
        sm: 计算能力，例如 90。
        inputs, outputs: 次序同算子契约。
        variants: 按次序取第一个适用的；最后一个总适用。
        aliases: 就地改写的：第几个输出与第几个输入是同一块内存。
    """

    op: str
    sm: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    variants: tuple[Variant[K], ...]
    aliases: tuple[tuple[int, int], ...] = ()

    @property
    def kernels(self) -> list[K]:
        """用到的 kernel，按启动的次序，各出现一次。"""
        return list(dict.fromkeys(launch.kernel for v in self.variants for launch in v.launches))

    def map(self, change: Callable[[K], _Other]) -> LaunchTable[_Other]:
        """每个 kernel 换成 ``change`` 的结果。"""
        made = {kernel: change(kernel) for kernel in self.kernels}
        variants = (
            Variant(
                v.when,
                v.workspace,
                tuple(Launch(made[one.kernel], one.grid, one.arguments) for one in v.launches),
            )
            for v in self.variants
        )
        return LaunchTable(self.op, self.sm, self.inputs, self.outputs, tuple(variants), self.aliases)

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """由输入的形状得到符号的值。

        Raises:
            ValueError: 形状与声明不符。
        """
        found: dict[str, int] = {}
        if [len(shape) for shape in shapes] != [len(tensor.dims) for tensor in self.inputs]:
            raise ValueError(f"{self.op} 的输入个数或秩不符：{[tuple(shape) for shape in shapes]}")
        for index, (tensor, shape) in enumerate(zip(self.inputs, shapes, strict=True)):
            for name, size in zip(tensor.dims, shape, strict=True):
                want = int(name) if name.isdigit() else found.setdefault(name, size)
                if size != want:
                    raise ValueError(f"{self.op} 的输入 {index} 形状是 {tuple(shape)}，维 {name} 应为 {want}")
        return found

    def select(self, sizes: Mapping[str, int]) -> Variant[K]:
        """这组尺寸用哪一个变体。"""
        return next(variant for variant in self.variants if variant.when.evaluate(sizes))

    def workspace(self, shapes: Sequence[Sequence[int]]) -> int:
        """对这组输入形状以及任何更小的形状都够用的 workspace 字节数。"""
        sizes = self.sizes(shapes)
        return max(variant.workspace.evaluate(sizes) for variant in self.variants)

    def bind(self, shapes: Sequence[Sequence[int]], sm_count: int) -> list[Launch[K, int]]:
        """这组输入形状在有 ``sm_count`` 个 SM 的卡上的启动序列；空网格（没有 token）已去掉。"""
        sizes = self.sizes(shapes) | {SM_COUNT: sm_count}
        bound = []
        for launch in self.select(sizes).launches:
            x, y, z = (axis.evaluate(sizes) for axis in launch.grid)
            if x * y * z:
                arguments = (
                    Argument(kind, value.evaluate(sizes) if isinstance(value, Expression) else value)
                    for kind, value in launch.arguments
                )
                bound.append(Launch(launch.kernel, (x, y, z), tuple(arguments)))
        return bound

    @property
    def image(self: Program) -> bytes:
        """各 kernel 的 cubin 首尾相接，同一个 kernel 只出现一次。"""
        return b"".join(kernel.cubin for kernel in self.kernels)

    def to_text(self: Program) -> str:
        """启动说明的文本形式；与 :attr:`image` 一起构成完整的程序。"""
        offsets: dict[CompiledKernel, int] = {}
        position = 0
        for kernel in self.kernels:
            offsets[kernel] = position
            position += len(kernel.cubin)
        lines = [_HEADER, f"op {self.op} {self.sm}"]
        for word, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"{word} {tensor.dtype} {' '.join(tensor.dims)}" for tensor in tensors]
        lines += [f"alias {output} {given}" for output, given in self.aliases]
        for variant in self.variants:
            lines += [f"variant {variant.when}", f"workspace {variant.workspace}"]
            for launch in variant.launches:
                k = launch.kernel
                place = f"{offsets[k]} {len(k.cubin)}"
                lines.append(f"launch {k.entry} {k.threads} {k.shared} {k.scratch} {place}")
                lines.append(f"grid {' ; '.join(map(str, launch.grid))}")
                lines += [f"argument {argument}" for argument in launch.arguments]
        return "\n".join(lines) + "\n"

    @staticmethod
    def from_text(text: str, image: bytes) -> Program:
        """:meth:`to_text` 与 :attr:`image` 的逆。

        Raises:
            ValueError: 不是这一版的格式，或 ``image`` 的长度不符。
        """
        header, *lines = text.splitlines()
        if header != _HEADER:
            raise ValueError(f"程序的首行是 {header!r}，应为 {_HEADER!r}")
        reader = _Reader(image)
        for line in lines:
            reader.read(line)
        program = reader.finish()
        if len(program.image) != len(image):
            raise ValueError(f"image 有 {len(image)} 字节，程序只用到 {len(program.image)} 字节")
        return program


#: 编译好的启动表。
Program: TypeAlias = LaunchTable[CompiledKernel]

_Launch: TypeAlias = Launch[CompiledKernel, Expression]


class _Reader:
    """逐行读入程序的文本。"""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._op, self._sm = "", 0
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._aliases: list[tuple[int, int]] = []
        self._variants: list[Variant[CompiledKernel]] = []

    def read(self, line: str) -> None:
        """一行；``variant`` 之后的各行补全最近的变体，``launch`` 之后的补全最近的启动。"""
        word, _, rest = line.partition(" ")
        match word:
            case "op":
                self._op, sm = rest.split()
                self._sm = int(sm)
            case "input" | "output":
                dtype, *dims = rest.split()
                (self._inputs if word == "input" else self._outputs).append(Tensor(dtype, tuple(dims)))
            case "alias":
                output, given = map(int, rest.split())
                self._aliases.append((output, given))
            case "variant":
                self._variants.append(Variant(Expression.parse(rest), Expression.of(0), ()))
            case "workspace":
                self._variants[-1] = replace(self._variants[-1], workspace=Expression.parse(rest))
            case "launch":
                zero = Expression.of(0)
                launch = Launch(self._kernel(*rest.split()), (zero, zero, zero), ())
                launches = (*self._variants[-1].launches, launch)
                self._variants[-1] = replace(self._variants[-1], launches=launches)
            case "grid":
                x, y, z = (Expression.parse(axis) for axis in rest.split(";"))
                self._extend(lambda launch: replace(launch, grid=(x, y, z)))
            case "argument":
                argument = _argument(*rest.split(" ", 1))
                self._extend(lambda launch: replace(launch, arguments=(*launch.arguments, argument)))
            case _:
                raise ValueError(f"不认识的行 {line!r}")

    def finish(self) -> Program:
        """全部读完之后的程序。"""
        inputs, outputs = tuple(self._inputs), tuple(self._outputs)
        return Program(self._op, self._sm, inputs, outputs, tuple(self._variants), tuple(self._aliases))

    def _kernel(self, entry: str, *numbers: str) -> CompiledKernel:
        threads, shared, scratch, offset, length = map(int, numbers)
        cubin = self._image[offset : offset + length]
        if len(cubin) != length:
            raise ValueError(f"image 只有 {len(self._image)} 字节，{entry} 需要到 {offset + length}")
        return CompiledKernel(entry, cubin, threads, shared, scratch)

    def _extend(self, change: Callable[[_Launch], _Launch]) -> None:
        *before, last = self._variants[-1].launches
        self._variants[-1] = replace(self._variants[-1], launches=(*before, change(last)))


def _argument(kind: str, value: str) -> Argument[Expression]:
    match kind:
        case "input" | "output":
            return Argument(kind, int(value))
        case "workspace" | "int32":
            return Argument(kind, Expression.parse(value))
        case "float32":
            return Argument(kind, float(value))
    raise ValueError(f"不认识的参数 {kind!r}")
