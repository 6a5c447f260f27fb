"""捕获图 → 目标的图：graph-surgeon pass、流水线、合法性检查、文本清单。"""

from deepseek_export.passes.base import GraphModule, Pass, PassError, PassResult
from deepseek_export.passes.listing import graph_listing
from deepseek_export.passes.pipelines import (
    QUANT_TARGETS,
    TARGETS,
    TENSORRT_TARGETS,
    LoweredModel,
    check_cache,
    check_quantization,
    check_target,
    lower,
    pipeline,
)

__all__ = [
    "QUANT_TARGETS",
    "TARGETS",
    "TENSORRT_TARGETS",
    "GraphModule",
    "LoweredModel",
    "Pass",
    "PassError",
    "PassResult",
    "check_cache",
    "check_quantization",
    "check_target",
    "graph_listing",
    "lower",
    "pipeline",
]
