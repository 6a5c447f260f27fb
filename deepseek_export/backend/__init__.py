"""执行一张图的后端：只有这里知道 ONNX Runtime 与 TensorRT。

- :mod:`.contract`：图的输入输出约定；:mod:`.base`：``Backend``、``Runner``、``Caches``、``Limits``；
- ``ort/``：ONNX Runtime CPU；``tensorrt/``：``dsx build`` 为当前 GPU 建的引擎。

用到哪个后端才导入哪个；导入本包不加载 torch，命令行从这里取 ``--backend`` 的取值。
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from deepseek_export.errors import DsxError

if TYPE_CHECKING:
    from deepseek_export.backend.base import Backend

#: ``--backend`` 的值 → 后端所在的模块，它的 ``BACKEND`` 就是后端。
BACKENDS: Mapping[str, str] = MappingProxyType(
    {"ort": "deepseek_export.backend.ort.backend", "trt": "deepseek_export.backend.tensorrt.backend"}
)


def backend_named(name: str) -> Backend:
    """按名字取后端。

    Raises:
        DsxError: ``DSX-E613``，没有这个后端。
    """
    if name not in BACKENDS:
        raise DsxError("DSX-E613", f"后端 {name!r} 不存在", f"可用的后端：{'、'.join(BACKENDS)}")
    found: Backend = import_module(BACKENDS[name]).BACKEND
    return found
