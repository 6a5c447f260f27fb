"""RoPE 参数：从两种 config.json 写法读成 :class:`RopeConfig`，以及 yarn 的缩放系数。"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deepseek_export.checkpoint.families import ROPE_KEYS, YARN_KEYS
from deepseek_export.checkpoint.fields import Fields
from deepseek_export.errors import DsxError

MAX_LENGTH = 1 << 30


@dataclass(frozen=True)
class RopeConfig:
    """RoPE 参数，语义同 transformers ``_compute_yarn_parameters``；``default`` 时 yarn 字段取中性值。"""

    rope_type: Literal["default", "yarn"]
    rope_theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def cos_sin_scale(self) -> float:
        """乘在 cos/sin 上的系数；``default`` 恒为 1。"""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """yarn 的 mscale：``factor <= 1`` 时为 1，否则 ``0.1·mscale·ln factor + 1``。"""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parse_rope(f: Fields, length: int) -> RopeConfig:
    """读 rope 字段，旧式 ``rope_scaling`` 与 transformers 5 的 ``rope_parameters`` 都认，但不能互相矛盾。

    Args:
        f: 整个 config.json。
        length: ``max_position_embeddings``，充当 yarn 原始长度的缺省值（同 transformers）。

    Raises:
        DsxError: ``DSX-E107`` rope 类型或字段不支持；``DSX-E106`` 缺 ``rope_theta``；``DSX-E105`` 其值不对。
    """
    code = "DSX-E107"
    old, new = f.data.get("rope_scaling"), f.data.get("rope_parameters")
    if old and new and old != new:
        raise f.bad("rope_scaling", "不与 rope_parameters 同时出现", code)
    key = "rope_scaling" if old else "rope_parameters"
    raw = old or new or {}
    if not isinstance(raw, dict):
        raise f.bad(key, "对象或 null", code)
    r = Fields(dict(raw), f"{f.where} 的 {key}")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise DsxError(code, f"{r.where} 的 rope 类型是 {kind!r}", "支持的 rope 类型：default、yarn")
    for name in ("type", "rope_type"):
        r.must_equal(name, kind, code=code)
    r.must_equal("partial_rotary_factor", 1, code=code)
    r.refuse_unknown(ROPE_KEYS | (YARN_KEYS if kind == "yarn" else frozenset()), code)
    top = f.data.get("rope_theta")
    if top is not None:
        r.must_equal("rope_theta", top, code=code)
    theta = (f if raw.get("rope_theta") is None else r).positive("rope_theta", above=1.0)
    if kind == "default":
        return RopeConfig("default", theta)
    pretrained = raw.get("original_max_position_embeddings") is not None
    rope = RopeConfig(
        "yarn",
        theta,
        factor=r.positive("factor", code=code),
        original_max_position_embeddings=(
            r.integer("original_max_position_embeddings", high=MAX_LENGTH, code=code)
            if pretrained
            else length
        ),
        beta_fast=r.number("beta_fast", code) or 32.0,
        beta_slow=r.number("beta_slow", code) or 1.0,
        mscale=r.number("mscale", code),
        mscale_all_dim=r.number("mscale_all_dim", code),
        attention_factor=(
            r.positive("attention_factor", code=code) if raw.get("attention_factor") is not None else None
        ),
        truncate=r.boolean("truncate", default=True, code=code),
    )
    if rope.factor < 1:
        raise r.bad("factor", "不小于 1 的数", code)
    if rope.beta_fast < rope.beta_slow:
        raise r.bad("beta_fast", f"不小于 beta_slow（{rope.beta_slow}）", code)
    return rope
