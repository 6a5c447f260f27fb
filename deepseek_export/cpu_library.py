"""C++ 算子库（``plugins/cpu``）：在哪里、这台机器用哪个指令集。

库登记了 ``dsx::MlaAttention``、``dsx::SparseMlaAttention``、``dsx::LightningIndexer``，与 int8、int4 的线性层与专家
（``dsx::Int8Linear``、``dsx::Int4Experts`` 等）。ONNX Runtime 优先用它们而不用模型里的函数体，所以同一个 bundle 有没有库都能跑，差别只是快慢。
只有目标 ``ort-cpu`` 用它：``portable`` 的含义就是不靠任何插件。

环境变量：``DSX_CPU_LIBRARY`` 换一个库的路径，``off`` 是不用；``DSX_CPU_ISA`` 指定指令集，缺省取最快的。
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_export.errors import DsxError

#: 构建脚本把库放在这里。
INSTALLED = Path(__file__).parent / "_native"
#: 用这个库的目标。
LIBRARY_TARGET = "ort-cpu"
OFF = "off"
BUILD_COMMAND = "make plugins"
NO_LIBRARY = (
    f"这台机器没有 C++ 算子库，注意力与量化的算子走函数体（{BUILD_COMMAND} 构建之后，同一个 bundle 就会用它）"
)


@dataclass(frozen=True)
class CpuLibrary:
    """一个能用的算子库。

    Attributes:
        path: 共享库。
        isas: 这台机器能用的指令集，最快的在前。
        isa: 新会话用哪一个。
    """

    path: Path
    isas: tuple[str, ...]
    isa: str

    def factors(self, cache_dtype: str) -> Literal["bfloat16", "int8"] | None:
        """注意力的乘数（query 与概率）会不会舍入：缓存是 bfloat16、指令集又直接乘它时舍入到 bfloat16；缓存是 int8 时拆成两个 int8
        平面，约 15 位（CPU-17）。"""
        if cache_dtype == "int8":
            return "int8"
        return "bfloat16" if cache_dtype == "bfloat16" and self.isa.endswith("bf16") else None

    def memory_reader(self) -> Callable[[int, int], int] | None:
        """把（地址，字节数）那一段内存顺着读一遍，读的时候不占 GIL；早先构建的库没有它，为 ``None``。"""
        read = getattr(ctypes.CDLL(str(self.path)), "dsx_cpu_read", None)
        if read is None:
            return None
        read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
        found: Callable[[int, int], int] = read
        return found


def find_library() -> CpuLibrary | None:
    """这台机器的算子库；没有构建，或用 ``DSX_CPU_LIBRARY=off`` 关掉了，则为 ``None``。

    Raises:
        DsxError: ``DSX-E520``，库装载不了；``DSX-E521``，``DSX_CPU_ISA`` 在这台机器上不能用。
    """
    given = os.environ.get("DSX_CPU_LIBRARY", "")
    if given == OFF:
        return None
    path = Path(given) if given else next(INSTALLED.glob("libdsx_cpu.*"), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.dsx_cpu_isas.restype = ctypes.c_char_p
        isas = tuple(library.dsx_cpu_isas().decode().split(","))
    except (OSError, AttributeError) as error:
        raise DsxError(
            "DSX-E520",
            f"{path}：{error}",
            f"重新构建（{BUILD_COMMAND}），或设 DSX_CPU_LIBRARY={OFF} 走函数体",
        ) from error
    isa = os.environ.get("DSX_CPU_ISA") or isas[0]
    if isa not in isas:
        raise DsxError("DSX-E521", f"DSX_CPU_ISA={isa}", f"这台机器能用：{'、'.join(isas)}；不设则取第一个")
    return CpuLibrary(path, isas, isa)


def library_for(target: str) -> CpuLibrary | None:
    """为 ``target`` 导出的 bundle 该用的算子库；同 :func:`find_library`，别的目标一律是 ``None``。"""
    return find_library() if target == LIBRARY_TARGET else None
