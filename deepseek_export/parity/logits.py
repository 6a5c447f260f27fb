"""整个模型的 logits 怎么比：用哪一行容差，以及路由在近平局处分叉之后的行怎么办。

缓存比模型窄时，舍入不是误差而是方案的一部分，所以参照的缓存舍入到同样的 dtype；舍入的代价对没有舍入的基准另比（``loss`` 级）。
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepseek_export.bundle import Manifest
from deepseek_export.parity.measures import measure
from deepseek_export.parity.report import Case, Level, compare
from deepseek_export.parity.tolerances import ROUTER_MARGIN, Dtype, Key, tolerance


def narrow_cache(manifest: Manifest) -> Dtype | None:
    """比模型窄的缓存的 dtype；不窄就是 ``None``。"""
    dtype = manifest.cache.dtype
    return None if dtype in (manifest.dtype, "float32") else dtype


def logits_key(manifest: Manifest) -> Key:
    """logits 的容差，参照与 bundle 用同样的权重与缓存 dtype；量化与 float16 的容差本来就更宽。"""
    narrow = narrow_cache(manifest)
    if narrow is not None and manifest.dtype == "float32" and manifest.quant is None:
        return "logits_narrow_cache", narrow, None
    return "logits", manifest.dtype, manifest.quant


def cache_loss_key(manifest: Manifest) -> Key:
    """窄缓存的 bundle 对没有舍入的基准；float16 模型的容差已经容得下。"""
    narrow = narrow_cache(manifest)
    if narrow is not None and manifest.dtype == "float32":
        return "cache_loss", narrow, None
    return "logits", manifest.dtype, None


def router_dtype(manifest: Manifest) -> Dtype:
    """路由的近平局判据取哪个 dtype：模型与缓存里较窄的那一个。"""
    return narrow_cache(manifest) or manifest.dtype


def logits_cases(
    level: Level, name: str, key: Key, got: np.ndarray, want: np.ndarray, margin: np.ndarray, router: Dtype
) -> Iterator[Case]:
    """比一批行；超差的行若在路由近平局之后，从那一行起单独比、单独计数，其余行仍按 ``key`` 要求。

    Args:
        level, name: 报告里的层级与名字。
        key: 容差的键。
        got, want: [..., S, V]。
        margin: [..., S]，路由离换一个专家有多远。
        router: 近平局判据的 dtype，见 :func:`router_dtype`。
    """
    case = compare(level, name, key[0], key[1], got, want, key[2])
    if case.passed or case.measure is None:
        yield case
        return
    limit = tolerance(*key).limit(measure(got, want).scale)
    wrong = ~(np.abs(got.astype(np.float64) - want).max(-1) <= limit)
    # 因果：近平局只影响它自己和它之后的行
    forked = np.logical_or.accumulate(
        wrong & np.logical_or.accumulate(margin < ROUTER_MARGIN[router], -1), -1
    )
    if not forked.any():
        yield case
        return
    if not forked.all():
        yield compare(level, name, key[0], key[1], got[~forked], want[~forked], key[2])
    loose = compare(level, name, "logits_after_near_tie", router, got[forked], want[forked])
    loose.near_ties = int(forked.sum())
    first = int(np.argwhere(forked)[0][-1])
    loose.note = f"第 {first} 个 token 起路由近平局；{loose.note}".rstrip("；")
    yield loose
