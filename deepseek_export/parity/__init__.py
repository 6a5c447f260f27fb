"""对齐校验：证明 bundle 与 PyTorch 相等，并指出第一处不相等的地方。"""

from deepseek_export.parity.report import LEVELS, Case, Level, ParityReport, QuantLoss
from deepseek_export.parity.verify import verify_bundle

__all__ = ["LEVELS", "Case", "Level", "ParityReport", "QuantLoss", "verify_bundle"]
