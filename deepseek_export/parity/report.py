"""对齐报告：JSON 存进 bundle，表格由命令行打印。"""

from __future__ import annotations

import platform
from typing import Any

import onnx
import torch
from pydantic import BaseModel, ConfigDict

from deepseek_export.backend.ort.session import runtime_version
from deepseek_export.parity.checks import Level
from deepseek_export.parity.measures import Measure, measure
from deepseek_export.parity.tolerances import Dtype, Key, Tolerance, tolerance


class Case(BaseModel):
    """一次比较。

    Attributes:
        level: 层级。
        name: 比的是什么，例如 ``layers.3.mlp``。
        passed: 是否通过。
        measure, tolerance: 数值比较才有。
        near_ties: 因近平局而不按错误计的行数或 token 数。
        note: 补充说明，例如 token 在哪一步分叉。
    """

    model_config = ConfigDict(extra="forbid")

    level: Level
    name: str
    passed: bool
    measure: Measure | None = None
    tolerance: Tolerance | None = None
    near_ties: int = 0
    note: str = ""


class Perplexity(BaseModel):
    """同一段文本上的困惑度。"""

    model_config = ConfigDict(extra="forbid")

    text: str
    tokens: int
    bundle: float
    unquantized: float


class QuantLoss(BaseModel):
    """只量化权重的代价，对未量化的基准。

    Attributes:
        kind, block: 量化的格式。
        tokens: 比了多少个 token 的 logits。
        before_a_flip: 其中路由还没有分叉的个数：到它为止，每行每层选中的专家都与基准相同；没有路由可比时等于 ``tokens``。
        relative_error: 全部 token 的 ``|差| / |基准|``（范数）。
        relative_error_before_a_flip: 只看路由分叉之前的 token；一个也没有时为 ``None``。
        perplexity: 给了文本才有。
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    block: int
    tokens: int
    before_a_flip: int
    relative_error: float
    relative_error_before_a_flip: float | None
    perplexity: Perplexity | None = None


class ActivationRange(BaseModel):
    """参考模型的激活放不放得进 float16。

    Attributes:
        largest: 绝对值最大的激活；溢出了（inf 或 NaN）为 ``None``。
        where: 它是哪个模块的输出，例如 ``layers.2.mlp``。
        limit: float16 最大的有限数。
        tokens, source: 走了多少个 token，从哪里来。
    """

    model_config = ConfigDict(extra="forbid")

    largest: float | None
    where: str
    limit: float
    tokens: int
    source: str

    @property
    def fits(self) -> bool:
        """没有溢出。"""
        return self.largest is not None

    @property
    def sentence(self) -> str:
        """一句话：最大的是多少、在哪里；溢出了怎么办。"""
        on = f"{self.tokens} 个 token，{self.source}"
        if self.largest is None:
            return f"{self.where} 的输出超过 float16 的 {self.limit:.0f}（{on}）：用 --dtype bfloat16 或 float32 再导出"
        return f"最大 {self.largest:.4g}，{self.where}，float16 到 {self.limit:.0f}（{on}）"


class ParityReport(BaseModel):
    """一次 ``dsx verify`` 的全部结果。"""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    checkpoint: str
    profile: str
    target: str
    dtype: Dtype
    oracle: str
    environment: dict[str, str]
    levels: list[Level]
    cases: list[Case]
    notes: list[str]
    loss: QuantLoss | None = None
    activations: ActivationRange | None = None
    polygraphy: str | None = None

    @property
    def passed(self) -> bool:
        """每一项都通过，且确实比过东西。"""
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def first_failure(self) -> Case | None:
        """第一处不通过：按 activations、op、block、model、tokens 与层的次序，也就是离病根最近的一处。"""
        return next((case for case in self.cases if not case.passed), None)

    def to_json(self) -> dict[str, Any]:
        """可写成 JSON 的字典，含 ``passed``。"""
        return {"passed": self.passed, **self.model_dump(mode="json")}


def compare(level: Level, name: str, key: Key, got: Any, want: Any) -> Case:
    """量一次、对照容差表，得到一条 :class:`Case`；形状不同就是不通过，没有可量的。"""
    if got.shape != want.shape:
        note = f"形状是 {list(got.shape)}，应为 {list(want.shape)}"
        return Case(level=level, name=name, passed=False, note=note)
    m, limit = measure(got, want), tolerance(*key)
    note = "" if limit.accepts(m) else f"最大差在 {list(m.coordinate)}"
    return Case(level=level, name=name, passed=limit.accepts(m), measure=m, tolerance=limit, note=note)


def environment() -> dict[str, str]:
    """决定结果的版本，写进报告。"""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": runtime_version(),
    }
