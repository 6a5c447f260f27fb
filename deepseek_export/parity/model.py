"""model 层：整个 bundle 的 logits 与基准比；一次 prefill、分块、逐 token、长度不等的 batch 各走一遍。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deepseek_export.bundle import Manifest
from deepseek_export.parity.logits import cache_loss_key, logits_cases, logits_key, router_dtype
from deepseek_export.parity.oracle import Oracle
from deepseek_export.parity.report import Case
from deepseek_export.parity.routing import row_margin
from deepseek_export.reference import ReferenceModel
from deepseek_export.runtime import Generator

_CHUNK = 7


def model_cases(
    manifest: Manifest,
    generator: Generator,
    oracle: Oracle,
    model: ReferenceModel,
    rows: Sequence[Sequence[int]],
    on_case: Callable[[str], None],
) -> Iterator[Case]:
    """逐条序列比 logits。

    Args:
        manifest: bundle 的 manifest。
        generator: 被验证的 bundle。
        oracle: 基准，权重与缓存 dtype 同 bundle。
        model: 同 dtype 的参考模型，只用来找路由近平局。
        rows: 长度可以不等的 token 序列。
        on_case: 每种走法开始前调用。
    """
    on_case("oracle")
    want = [oracle.logits(row) for row in rows]
    margins = [row_margin(manifest, model, row) for row in rows]
    ways: list[tuple[str, Callable[[], list[np.ndarray]]]] = [
        ("prefill", lambda: [generator.logits([row])[0] for row in rows]),
        (f"chunks of {_CHUNK}", lambda: [generator.logits([row], chunk=_CHUNK)[0] for row in rows]),
        ("token by token", lambda: [generator.logits([row], chunk=1)[0] for row in rows]),
        ("ragged batch", lambda: generator.logits(rows)),
    ]
    key, router = logits_key(manifest), router_dtype(manifest)
    for way, run in ways:
        on_case(way)
        for i, (got, expected, margin) in enumerate(zip(run(), want, margins, strict=True)):
            name = f"logits[{i}] {way} ({len(expected)} tokens)"
            yield from logits_cases("model", name, key, got, expected, margin, router)


def cache_loss_cases(
    manifest: Manifest,
    generator: Generator,
    oracle: Oracle,
    model: ReferenceModel,
    rows: Sequence[Sequence[int]],
    on_case: Callable[[str], None],
) -> Iterator[Case]:
    """窄缓存的代价：bundle 的 logits 与缓存没有舍入的基准比；参数同 :func:`model_cases`，只有 ``oracle`` 的缓存不同。"""
    key, router = cache_loss_key(manifest), router_dtype(manifest)
    for i, row in enumerate(rows):
        on_case(f"logits[{i}]")
        name = f"logits[{i}]，{manifest.cache.dtype} 缓存对 {manifest.dtype} ({len(row)} tokens)"
        got, want = generator.logits([row])[0], oracle.logits(row)
        yield from logits_cases("loss", name, key, got, want, row_margin(manifest, model, row), router)
