"""引擎的优化配置：每个维的最小、最优、最大值。"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from deepseek_export.errors import DsxError
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS
from deepseek_export.profile import OptimizationProfile

Range = tuple[int, int, int]

_HINT = "写成 B=最小:最优:最大,S=最优:最大,T=容量，例如 B=1:1:8,S=128:512,T=4096；没写的用缺省值"
_DEFAULT_CAPACITY = 4096
_COUNTS = {"B": 3, "S": 2, "T": 1}
#: P 按它的倍数凑整。
_SMALLEST_STEP = 64
#: CUDA 的线程格在 y、z 上的上限；LatentAttention 的核把 B 放在这两维上。
_MAX_BATCH = 65535


def has_prefill(profile: OptimizationProfile) -> bool:
    """有没有 prefill 路径；``mla.form=absorb`` 只有插件核，一次至多 8 个 token。"""
    return not (profile.mla.enabled and profile.mla.form == "absorb")


class ProfileShapes(BaseModel):
    """两个优化配置的形状。

    Attributes:
        batch: B 的最小、最优、最大值，两个配置共用。
        prefill: prefill 配置里 S 的最优、最大值；最小值总是 9，8 及以下归 decode。
        capacity: 缓存容量 T。TensorRT 的 KV_CACHE_UPDATE 要求它是常数。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = (1, 1, 8)
    prefill: tuple[int, int] = (128, 512)
    capacity: int = _DEFAULT_CAPACITY

    @classmethod
    def parse(cls, text: str, max_positions: int) -> ProfileShapes:
        """``--profile-shapes`` 的值。

        Args:
            text: 例如 ``B=1:1:8,S=128:512,T=4096``；空串全用缺省值。
            max_positions: 模型的 max_position_embeddings，容量的上限。

        Raises:
            DsxError: ``DSX-E919``。
        """
        found: dict[str, list[int]] = {}
        for part in filter(None, text.split(",")):
            match = re.fullmatch(r"\s*([BST])=(\d+(?::\d+)*)\s*", part)
            if match is None or match[1] in found:
                raise DsxError("DSX-E919", f"--profile-shapes {text!r} 里的 {part.strip()!r}", _HINT)
            found[match[1]] = [int(number) for number in match[2].split(":")]
            if len(found[match[1]]) != _COUNTS[match[1]]:
                raise DsxError(
                    "DSX-E919", f"{match[1]} 要 {_COUNTS[match[1]]} 个数，给的是 {match[2]}", _HINT
                )
        capacity = found.get("T", [min(_DEFAULT_CAPACITY, max_positions)])[0]
        if not MAX_DECODE_TOKENS < capacity <= max_positions:
            allowed = f"{MAX_DECODE_TOKENS + 1} 到 max_position_embeddings = {max_positions}"
            raise DsxError("DSX-E919", f"容量 T = {capacity}，应在 {allowed} 之间", _HINT)
        low, middle, high = found.get("B", (1, 1, 8))
        if not 1 <= low <= middle <= high <= _MAX_BATCH:
            what = f"B = {low}:{middle}:{high} 不是 1 到 {_MAX_BATCH} 之间递增的整数"
            raise DsxError("DSX-E919", what, _HINT)
        best, largest = found.get("S", [min(size, capacity) for size in (128, 512)])
        if not MAX_DECODE_TOKENS < best <= largest <= capacity:
            allowed = f"{MAX_DECODE_TOKENS + 1} <= 最优 <= 最大 <= T = {capacity}"
            raise DsxError("DSX-E919", f"S = {best}:{largest}，应满足 {allowed}", _HINT)
        return cls(batch=(low, middle, high), prefill=(best, largest), capacity=capacity)

    def profiles(self, profile: OptimizationProfile, key_span: bool) -> Mapping[str, Mapping[str, Range]]:
        """配置名 → 动态维 → 最小、最优、最大值，次序就是引擎里的编号。

        Args:
            profile: bundle 的方案。
            key_span: 图有没有 :data:`~deepseek_export.engine.graph.KEY_SPAN`，有才有 P。解码不走 prefill 路径的，P 总是 1。
        """
        best, largest = self.prefill
        top = MAX_DECODE_TOKENS
        keys: Range = (1, largest, self.capacity)
        decode_keys = keys if profile.mla.form == "naive" else (1, 1, 1)
        made: dict[str, dict[str, Range]] = {
            "decode": {"B": self.batch, "S": (1, 1, top), "L": (1, 1, top), "K": (0, 0, top - 1)}
        }
        if key_span:
            made["decode"]["P"] = decode_keys
        if has_prefill(profile):
            made["prefill"] = {
                "B": self.batch,
                "S": (top + 1, best, largest),
                "L": (1, 1, largest),
                "K": (0, 0, top),
            }
            if key_span:
                made["prefill"]["P"] = keys
        return made


def span_of(longest: int, allowed: Range) -> int:
    """P 取多少：至少 ``longest``，凑整使形状不至于一个长度一种——每翻一倍四档，多看的不到四分之一；不出 ``allowed``。"""
    low, _, high = allowed
    step = max(_SMALLEST_STEP, (1 << (longest - 1).bit_length()) // 8)
    return min(max(math.ceil(longest / step) * step, low), high)
