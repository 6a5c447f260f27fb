"""当前安装的 onnxruntime 有哪些 com.microsoft 的 CPU float32 kernel。

下沉时现查：较旧的 onnxruntime 没有 ``MoEGroupRouter``，写死版本号不如直接问它。
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deepseek_export.dtypes import DTYPES

MICROSOFT = "com.microsoft"
FLOAT = DTYPES["float32"].onnx_type


@dataclass(frozen=True)
class OrtKernels:
    """可用的 kernel。

    Attributes:
        version: onnxruntime 的版本。
        attributes: 有 CPU float32 kernel 的 com.microsoft 算子 → schema 认得的属性。
    """

    version: str
    attributes: Mapping[str, frozenset[str]]

    def missing(self, op: str, attributes: Collection[str]) -> str | None:
        """缺什么；``None`` 表示这个算子带这些属性可以运行。"""
        if op not in self.attributes:
            return f"没有 {op} 的 CPU float32 kernel"
        unknown = sorted(set(attributes) - self.attributes[op])
        return f"{op} 不认得属性 {'、'.join(unknown)}" if unknown else None


@functools.cache
def installed_kernels() -> OrtKernels:
    """查询当前安装的 onnxruntime。"""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    runnable = {
        kernel.op_name
        for kernel in state.get_all_opkernel_def()
        if kernel.domain == MICROSOFT
        and kernel.provider == "CPUExecutionProvider"
        and FLOAT in kernel.type_constraints.get("T", [FLOAT])
    }
    attributes = {
        schema.name: frozenset(schema.attributes)
        for schema in state.get_all_operator_schema()
        if schema.domain == MICROSOFT and schema.name in runnable
    }
    return OrtKernels(onnxruntime.__version__, attributes)
