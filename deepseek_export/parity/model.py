"""model 层：整个 bundle 的 logits 与基准比；一次 prefill、分块、逐 token、长度不等的 batch 各走一遍。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from deepseek_export.checkpoint.weight_only import QuantKind
from deepseek_export.parity.oracle import Oracle
from deepseek_export.parity.report import Case, compare
from deepseek_export.parity.routing import router_margin
from deepseek_export.parity.tolerances import ROUTER_MARGIN, Dtype
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.runtime import Generator

_CHUNK = 7


def model_cases(
    generator: Generator,
    oracle: Oracle,
    model: ReferenceModel,
    rows: Sequence[Sequence[int]],
    dtype: Dtype,
    on_case: Callable[[str], None],
    quant: QuantKind | None = None,
) -> Iterator[Case]:
    """逐条序列比 logits。

    Args:
        generator: 被验证的 bundle。
        oracle: 基准。
        model: 同 dtype 的参考模型，只用来找路由近平局。
        rows: 长度可以不等的 token 序列。
        dtype: 模型 dtype。
        on_case: 每种走法开始前调用。
        quant: bundle 的权重量化；激活的 int8 舍入会让路由在近平局处翻转，容差已经计入，不再逐行找近平局。
    """
    on_case("oracle")
    want = [oracle.logits(row) for row in rows]
    strict = [len(row) if quant else _rows_before_near_tie(model, row, dtype) for row in rows]
    ways: list[tuple[str, Callable[[], list[np.ndarray]]]] = [
        ("prefill", lambda: [generator.logits([row])[0] for row in rows]),
        (f"chunks of {_CHUNK}", lambda: [generator.logits([row], chunk=_CHUNK)[0] for row in rows]),
        ("token by token", lambda: [generator.logits([row], chunk=1)[0] for row in rows]),
        ("ragged batch", lambda: generator.logits(rows)),
    ]
    for way, run in ways:
        on_case(way)
        for i, (got, expected, n) in enumerate(zip(run(), want, strict, strict=True)):
            name = f"logits[{i}] {way} ({len(expected)} tokens)"
            if n:
                yield compare("model", name, "logits", dtype, got[:n], expected[:n], quant)
            if n < len(expected):
                case = compare("model", name, "logits_after_near_tie", dtype, got[n:], expected[n:])
                case.near_ties = len(expected) - n
                case.note = f"第 {n} 个 token 起路由近平局；{case.note}".rstrip("；")
                yield case


@torch.no_grad()
def _rows_before_near_tie(model: ReferenceModel, ids: Sequence[int], dtype: Dtype) -> int:
    """参考模型里第一个出现路由近平局的位置；它之前的行不受影响（因果）。"""
    tokens, past = torch.tensor([list(ids)]), torch.zeros(1, dtype=torch.int64)
    x, cos, sin = model.embed(tokens, past)
    margin = torch.full(tokens.shape, torch.inf)
    for layer, caches in zip(model.layers, model.empty_caches(1, len(ids)), strict=True):
        assert isinstance(layer, DecoderLayer)
        residual, x, *_ = layer(x, cos, sin, past, *caches)
        margin = torch.minimum(margin, router_margin(layer, residual, model.config))
    close = (margin[0] < ROUTER_MARGIN[dtype]).nonzero()
    return int(close[0]) if len(close) else len(ids)
