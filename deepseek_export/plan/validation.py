"""流水线的模拟对照过什么测量：由 ``python -m perf pages`` 从历史写出，这里只读。"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.plan.result import Validation

#: 由历史写出来的；没有量过就没有 ``errors``。
VALIDATION_FILE = Path(__file__).with_name("validation.json")


def simulation_error() -> Validation:
    """模拟与测量差多少。"""
    return Validation.model_validate_json(VALIDATION_FILE.read_text(encoding="utf-8"))
