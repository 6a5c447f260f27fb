"""对齐校验：证明 bundle 与 PyTorch 相等，并指出第一处不相等的地方。

各名字按需导入：只用度量与容差表的地方（``perf/gpu``）不必有 onnx、ONNX Runtime、pydantic。
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_export.parity.bisect import Culprit
    from deepseek_export.parity.checks import LEVELS, Level
    from deepseek_export.parity.compare import BlockCase, ComparisonReport, compare_bundle
    from deepseek_export.parity.report import Case, ParityReport, QuantLoss
    from deepseek_export.parity.verify import verify_bundle

_EXPORTS = {
    "LEVELS": "deepseek_export.parity.checks",
    "BlockCase": "deepseek_export.parity.compare",
    "Case": "deepseek_export.parity.report",
    "ComparisonReport": "deepseek_export.parity.compare",
    "Culprit": "deepseek_export.parity.bisect",
    "Level": "deepseek_export.parity.checks",
    "ParityReport": "deepseek_export.parity.report",
    "QuantLoss": "deepseek_export.parity.report",
    "compare_bundle": "deepseek_export.parity.compare",
    "verify_bundle": "deepseek_export.parity.verify",
}

__all__ = [
    "LEVELS",
    "BlockCase",
    "Case",
    "ComparisonReport",
    "Culprit",
    "Level",
    "ParityReport",
    "QuantLoss",
    "compare_bundle",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
