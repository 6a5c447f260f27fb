"""动工之前的估算：只读 config.json 与 safetensors 文件头，不加载 torch。"""

from deepseek_export.plan.gpus import GPUS
from deepseek_export.plan.plan import make_plan
from deepseek_export.plan.result import Plan

__all__ = ["GPUS", "Plan", "make_plan"]
