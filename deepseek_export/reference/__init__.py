"""可读的 PyTorch 参考模块：对齐校验的基准，也是捕获的来源。"""

from deepseek_export.reference.model import Forms, ReferenceModel, cache_tensors
from deepseek_export.reference.mtp import DraftModel
from deepseek_export.reference.weights import initializer_name, load_draft, load_reference

__all__ = [
    "DraftModel",
    "Forms",
    "ReferenceModel",
    "cache_tensors",
    "initializer_name",
    "load_draft",
    "load_reference",
]
