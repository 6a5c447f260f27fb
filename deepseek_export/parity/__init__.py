"""对齐校验：证明 bundle 与 PyTorch 相等，并指出第一处不相等的地方。"""

from deepseek_export.parity.bisect import Culprit
from deepseek_export.parity.compare import BlockCase, ComparisonReport, compare_bundle
from deepseek_export.parity.report import LEVELS, Case, Level, ParityReport
from deepseek_export.parity.verify import verify_bundle

__all__ = [
    "LEVELS",
    "BlockCase",
    "Case",
    "ComparisonReport",
    "Culprit",
    "Level",
    "ParityReport",
    "compare_bundle",
    "verify_bundle",
]
