"""RoPE 参数：从两种 config.json 写法读成 :class:`RopeConfig`，以及 yarn 的缩放系数。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek_export.checkpoint.families import LONGROPE_KEYS, ROPE_KEYS, YARN_KEYS
from deepseek_export.checkpoint.fields import Fields, shown
from deepseek_export.errors import DsxError

MAX_LENGTH = 1 << 30
_TYPE_KEYS = {"default": frozenset[str](), "yarn": YARN_KEYS, "longrope": LONGROPE_KEYS}


@dataclass(frozen=True)
class RopeConfig:
    """RoPE 参数，语义同 transformers 的 ``modeling_rope_utils.py``；与类型无关的字段取中性值。

    ``longrope`` 只收下结果与序列长度无关的那些（见 :func:`parse_rope`），所以只留一套 ``short_factor``。
    """

    rope_type: Literal["default", "yarn", "longrope"]
    rope_theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()

    @property
    def cos_sin_scale(self) -> float:
        """乘在 cos/sin 上的系数；``default`` 恒为 1。"""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            if self.factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """yarn 的 mscale：``factor <= 1`` 时为 1，否则 ``0.1·mscale·ln factor + 1``。"""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parse_rope(
    f: Fields, length: int, dim: int, aliases: Mapping[str, str] = MappingProxyType({})
) -> RopeConfig:
    """读 rope 字段，旧式 ``rope_scaling`` 与 transformers 5 的 ``rope_parameters`` 都认，但不能互相矛盾。

    Args:
        f: 整个 config.json。
        length: ``max_position_embeddings``，充当 yarn、longrope 原始长度的缺省值（同 transformers）。
        dim: ``qk_rope_head_dim``，longrope 每对 lane 一个因子。
        aliases: 这个家族给 rope 类型另起的名字 → 正名。

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
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _TYPE_KEYS:
        raise DsxError(
            code, f"{r.where} 的 rope 类型是 {shown(kind)}", f"支持的 rope 类型：{'、'.join(_TYPE_KEYS)}"
        )
    for name in ("type", "rope_type"):
        r.must_equal(name, kind, *(alias for alias, proper in aliases.items() if proper == kind), code=code)
    r.must_equal("partial_rotary_factor", 1, code=code)
    r.refuse_unknown(ROPE_KEYS | _TYPE_KEYS[kind], code)
    top = f.data.get("rope_theta")
    if top is not None:
        r.must_equal("rope_theta", top, code=code)
    theta = (f if raw.get("rope_theta") is None else r).positive("rope_theta", above=1.0)
    if kind == "default":
        return RopeConfig("default", theta)
    pretrained = length
    if raw.get("original_max_position_embeddings") is not None:
        pretrained = r.integer("original_max_position_embeddings", high=MAX_LENGTH, code=code)
    if kind == "longrope":
        return _longrope(r, theta, length, pretrained, dim)
    rope = RopeConfig(
        "yarn",
        theta,
        factor=r.positive("factor", code=code),
        original_max_position_embeddings=pretrained,
        beta_fast=r.number("beta_fast", code) or 32.0,
        beta_slow=r.number("beta_slow", code) or 1.0,
        mscale=r.number("mscale", code),
        mscale_all_dim=r.number("mscale_all_dim", code),
        attention_factor=_optional_positive(r, "attention_factor"),
        truncate=r.boolean("truncate", default=True, code=code),
    )
    if rope.factor < 1:
        raise r.bad("factor", "不小于 1 的数", code)
    if rope.beta_fast < rope.beta_slow:
        raise r.bad("beta_fast", f"不小于 beta_slow（{rope.beta_slow}）", code)
    return rope


def _longrope(r: Fields, theta: float, length: int, pretrained: int, dim: int) -> RopeConfig:
    """longrope；序列超过 ``pretrained`` 就换一套频率的拒绝：缓存里已经转过的 key 换不了。"""
    short, long = (_factors(r, key, dim // 2) for key in ("short_factor", "long_factor"))
    if length > pretrained and short != long:
        raise DsxError(
            "DSX-E107",
            f"{r.where} 的 longrope 在长度超过 {pretrained} 时换用 long_factor，而 max_position_embeddings 是 {length}",
            f"把 max_position_embeddings 改成不超过 {pretrained}；缓存里的 key 已按 short_factor 旋转，换不了",
        )
    return RopeConfig(
        "longrope",
        theta,
        factor=_optional_positive(r, "factor") or length / pretrained,
        original_max_position_embeddings=pretrained,
        attention_factor=_optional_positive(r, "attention_factor"),
        short_factor=short,
    )


def _factors(r: Fields, key: str, count: int) -> tuple[float, ...]:
    value = r.require(key)
    if not isinstance(value, list) or len(value) != count:
        raise r.bad(key, f"{count} 个正数的列表", "DSX-E107")
    factors = Fields({f"{key}[{i}]": item for i, item in enumerate(value)}, r.where)
    return tuple(factors.positive(name, code="DSX-E107") for name in factors.data)


def _optional_positive(r: Fields, key: str) -> float | None:
    return None if r.data.get(key) is None else r.positive(key, code="DSX-E107")
