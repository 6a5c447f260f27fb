"""int4 的校准：让文本流过模型，按每个矩阵真实的输入取码，预测比取最近的码离没有量化的近。"""

from deepseek_export.calibration.gptq import DAMPING
from deepseek_export.calibration.model import Calibrated, calibrate
from deepseek_export.calibration.overlay import codes_bytes
from deepseek_export.calibration.text import CalibrationText, read_calibration
from deepseek_export.calibration.weights import Formats, is_calibrated, shapes

__all__ = [
    "DAMPING",
    "Calibrated",
    "CalibrationText",
    "Formats",
    "calibrate",
    "codes_bytes",
    "is_calibrated",
    "read_calibration",
    "shapes",
]
