"""编译留下的事实：目标、算子的位置、每个 pass 的报告。

捕获与 pass 产生它们，manifest 存着它们，只跑 bundle 的人也读得到，所以这里不导入 torch 与 onnx。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ModelDtype = Literal["float32", "float16", "bfloat16"]

#: 产物用来建 TensorRT 引擎的目标。
TENSORRT_TARGETS = ("tensorrt", "tensorrt-rtx")
#: 支持只量化权重的目标。
QUANT_TARGETS = ("ort-cpu", *TENSORRT_TARGETS)
#: 全部目标。
TARGETS = ("portable", *QUANT_TARGETS)

#: 引擎比 bundle 的图多的输出，都是 ``[B, L, 1]``：每个位置最大的 token（int64）与它的 logit（float32，logits 里有 NaN 就是无穷大）。
BEST_ID, BEST_LOGIT = "best_id", "best_logit"


@dataclass(frozen=True)
class OpSite:
    """一个 ``dsx::`` 节点的位置。下沉 pass 会换掉节点，但保留这些值名，对齐校验靠它们截取子图。"""

    layer: int
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Refusal(BaseModel):
    """一处看着匹配却没有改写的地方。

    Attributes:
        node: 节点名。
        reason: 为什么（中文）。
        value: 原因所指的值，例如 ``scoring_func = softmax``。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str
    reason: str
    value: str


class PassResult(BaseModel):
    """一个 pass 的如实报告。

    Attributes:
        name: pass 名。
        changed: 图是否变了。
        count: 改写了几处。
        refused: 没有改写的候选，逐个写明原因。
        kept: 用户要保留而没有改写的有几处。
        notes: 候选之外没有改写的，逐条写进 ``fallbacks``。``kept`` 与它都不写进 manifest。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    changed: bool
    count: int
    refused: tuple[Refusal, ...] = ()
    kept: int = Field(default=0, exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)
