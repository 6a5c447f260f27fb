"""对齐校验：证明 bundle 与 PyTorch 相等，并指出第一处不相等的地方。

各名字按需导入：只用度量与容差表的地方（``perf/gpu``）不必有 onnx、ONNX Runtime、pydantic。
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_export.parity.report import LEVELS, Case, Level, ParityReport, QuantLoss
    from deepseek_export.parity.verify import verify_bundle

_EXPORTS = {
    "LEVELS": "deepseek_export.parity.report",
    "Case": "deepseek_export.parity.report",
    "Level": "deepseek_export.parity.report",
    "ParityReport": "deepseek_export.parity.report",
    "QuantLoss": "deepseek_export.parity.report",
    "verify_bundle": "deepseek_export.parity.verify",
}

__all__ = ["LEVELS", "Case", "Level", "ParityReport", "QuantLoss", "verify_bundle"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
