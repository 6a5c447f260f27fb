"""捕获图 → 目标的图：graph-surgeon pass、流水线、合法性检查、文本清单。"""

from deepseek_export.passes.base import GraphModule, Pass, PassError
from deepseek_export.passes.listing import graph_listing
from deepseek_export.passes.lowering import (
    LoweredModel,
    check_cache,
    check_quantization,
    check_target,
    lower,
)
from deepseek_export.passes.pipelines import pipeline

__all__ = [
    "GraphModule",
    "LoweredModel",
    "Pass",
    "PassError",
    "check_cache",
    "check_quantization",
    "check_target",
    "graph_listing",
    "lower",
    "pipeline",
]
