"""捕获图 → 目标的图：graph-surgeon pass、流水线、合法性检查、文本清单。"""

from deepseek_export.passes.base import GraphModule, Pass, PassError, PassResult, Refusal
from deepseek_export.passes.listing import graph_listing
from deepseek_export.passes.pipelines import (
    PIPELINES,
    QUANT_PIPELINES,
    TENSORRT_TARGETS,
    LoweredModel,
    check_cache,
    check_quantization,
    check_target,
    lower,
)

__all__ = [
    "PIPELINES",
    "QUANT_PIPELINES",
    "TENSORRT_TARGETS",
    "GraphModule",
    "LoweredModel",
    "Pass",
    "PassError",
    "PassResult",
    "Refusal",
    "check_cache",
    "check_quantization",
    "check_target",
    "graph_listing",
    "lower",
]
