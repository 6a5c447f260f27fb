"""OptimizationProfile：MLA、MoE、MTP 三项优化唯一的开关处。

默认全关，全关就是基线。方案可以是内置名（``mla+moe`` 表示组合），也可以是 TOML 文件；
``--set mla.form=absorb`` 逐键覆盖。未知的键、不允许的值、不成立的组合一律报错，绝不悄悄忽略。
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek_export.errors import DsxError, did_you_mean
from deepseek_export.paths import read_text


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class MlaSection(_Section):
    """MLA：缓存潜向量，而不是展开后的逐头 K/V。"""

    enabled: bool = False
    form: Literal["absorb", "naive", "auto"] = "auto"
    cache_dtype: Literal["model", "float32", "float16", "bfloat16", "int8"] = "model"


class DsaSection(_Section):
    """稀疏注意力（DSA）：要不要它由模型定，这里只说索引 key 怎么存；``cache`` 是与别的缓存同样的浮点。"""

    index_cache_dtype: Literal["cache", "int8"] = "cache"


class MoeSection(_Section):
    """MoE：只计算被路由选中的专家；关闭时所有专家都算，再乘路由权重。"""

    enabled: bool = False
    experts: Literal["sparse"] = "sparse"


class MtpSection(_Section):
    """MTP：用检查点自带的 MTP 层做投机解码；关闭时逐个 token 自回归。"""

    enabled: bool = False
    num_draft_tokens: int = Field(default=1, ge=1, le=8)
    verify: Literal["greedy", "rejection"] = "greedy"


class FallbackSection(_Section):
    """对齐校验不过时怎么办；无论选哪种，都会记进 manifest。"""

    on_drift: Literal["refuse", "naive"] = "refuse"


class OptimizationProfile(_Section):
    """一份完整、已校验、不可变的优化方案。

    Raises:
        DsxError: 组合不成立（``DSX-E004``），直接构造时也会检查。
    """

    mla: MlaSection = MlaSection()
    dsa: DsaSection = DsaSection()
    moe: MoeSection = MoeSection()
    mtp: MtpSection = MtpSection()
    fallback: FallbackSection = FallbackSection()

    @model_validator(mode="after")
    def _check(self) -> OptimizationProfile:
        for name in _SWITCHES:
            section = getattr(self, name)
            for key, info in type(section).model_fields.items():
                if not section.enabled and getattr(section, key) != info.default:
                    raise _switched_off(name, key, getattr(section, key))
        if self.fallback.on_drift == "naive":
            if not self.mla.enabled:
                raise DsxError(
                    "DSX-E004",
                    "fallback.on_drift=naive 要退回朴素 MLA，但 mla.enabled=false，没有可退回的形式",
                    "同时打开 MLA（-p mla），或把 fallback.on_drift 设为 refuse",
                )
            if self.mla.form == "naive":
                raise DsxError(
                    "DSX-E004",
                    "mla.form 已经是 naive，fallback.on_drift=naive 无处可退",
                    "把 fallback.on_drift 设为 refuse，或把 mla.form 改成 absorb / auto",
                )
        return self

    def check_model(self, family: str, sparse: bool) -> None:
        """方案说了索引 key 怎么存，模型就得有索引器（``sparse``）。

        Raises:
            DsxError: ``DSX-E136``，没有。
        """
        if self.dsa.index_cache_dtype != "cache" and not sparse:
            raise DsxError(
                "DSX-E136",
                f"dsa.index_cache_dtype={self.dsa.index_cache_dtype}，而 {family} 没有稀疏注意力",
                "去掉 dsa.index_cache_dtype",
            )

    @property
    def name(self) -> str:
        """由打开的部分得出的名字：``baseline``、``mla+moe``、``full`` 等。"""
        on = [name for name in _SWITCHES if getattr(self, name).enabled]
        return "full" if len(on) == len(_SWITCHES) else "+".join(on) or "baseline"

    @property
    def overrides(self) -> list[str]:
        """在 :attr:`name` 之上还改了哪些键，``--set`` 的写法。"""
        return [
            f"{name}.{key}={getattr(section, key)}"
            for name, section in self
            for key, info in type(section).model_fields.items()
            if key != "enabled" and getattr(section, key) != info.default
        ]

    def to_toml(self) -> str:
        """写成 TOML 文本，含全部键；再读回来得到相等的方案。"""
        return tomli_w.dumps(self.model_dump())


_SWITCHES = ("mla", "moe", "mtp")
_SECTIONS: Mapping[str, type[_Section]] = MappingProxyType(
    {
        "mla": MlaSection,
        "dsa": DsaSection,
        "moe": MoeSection,
        "mtp": MtpSection,
        "fallback": FallbackSection,
    }
)
_KEYS = tuple(f"{section}.{key}" for section, cls in _SECTIONS.items() for key in cls.model_fields)

_BUILTIN_VALUES: Mapping[str, dict[str, dict[str, Any]]] = MappingProxyType(
    {
        "baseline": {},
        "mla": {"mla": {"enabled": True}},
        "moe": {"moe": {"enabled": True}},
        "mtp": {"mtp": {"enabled": True}},
        "full": {name: {"enabled": True} for name in _SWITCHES},
    }
)
BUILTIN_PROFILES: Mapping[str, OptimizationProfile] = MappingProxyType(
    {name: OptimizationProfile.model_validate(values) for name, values in _BUILTIN_VALUES.items()}
)


def resolve_profile(
    spec: str | OptimizationProfile | Path, overrides: Sequence[str] = ()
) -> OptimizationProfile:
    """把命令行上的写法变成一份已校验的方案。

    Args:
        spec: 内置名或用 ``+`` 连起来的组合；含 ``/`` 或以 ``.toml`` 结尾的部分当作文件路径；
            也可以直接给方案对象。
        overrides: 形如 ``mla.form=absorb`` 的覆盖项，值按 TOML 解析，裸词当字符串；后面的盖过前面的。

    Returns:
        校验过的 :class:`OptimizationProfile`。

    Raises:
        DsxError: ``DSX-E001`` 未知方案；``DSX-E002`` 未知键；``DSX-E003`` 值不允许；``DSX-E004`` 组合不成立；
            ``DSX-E005`` TOML 文件读不了。
    """
    if isinstance(spec, OptimizationProfile):
        values: dict[str, dict[str, Any]] = spec.model_dump()
    elif isinstance(spec, Path):
        values = _read_toml(spec)
    elif _is_path(spec) and _is_file(spec):
        values = _read_toml(Path(spec))
    else:
        values = _compose(spec)
    touched: list[tuple[str, str]] = []
    if isinstance(overrides, str):
        raise DsxError("DSX-E002", f"overrides 是字符串 {overrides!r}，要的是列表", f'写成 ["{overrides}"]')
    for item in overrides:
        section, key, value = _parse_override(item)
        values.setdefault(section, {})[key] = value
        touched.append((section, key))
    profile = _validate(values)
    for section, key in touched:
        if section in _SWITCHES and key != "enabled" and not getattr(profile, section).enabled:
            raise _switched_off(section, key, values[section][key])
    return profile


def _is_path(part: str) -> bool:
    return "/" in part or part.endswith(".toml")


def _is_file(spec: str) -> bool:
    """看不了的（没有权限、名字太长）不算，留给读的时候报。"""
    try:
        return Path(spec).is_file()
    except OSError:
        return False


def _compose(spec: str) -> dict[str, dict[str, Any]]:
    """合并各部分明确写出的值；同一个键给出两个不同的值就是冲突。"""
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[tuple[str, str], str] = {}
    for part in spec.split("+"):
        name = part.strip()
        for section, keys in (_read_toml(Path(name)) if _is_path(name) else _builtin(name)).items():
            for key, value in keys.items():
                old = merged.setdefault(section, {}).setdefault(key, value)
                first = origin.setdefault((section, key), name)
                if old != value or type(old) is not type(value):
                    raise DsxError(
                        "DSX-E004",
                        f"{section}.{key} 在 {first} 里是 {_show(old)}，在 {name} 里却是 {_show(value)}",
                        f"从组合里去掉其中一个，或改成同一个值（组合：{spec}）",
                    )
    return merged


def _builtin(name: str) -> dict[str, dict[str, Any]]:
    if name in _BUILTIN_VALUES:
        return {section: dict(keys) for section, keys in _BUILTIN_VALUES[name].items()}
    raise DsxError(
        "DSX-E001",
        f"没有叫 {name!r} 的优化方案",
        f"{did_you_mean(name, _BUILTIN_VALUES)}可选：{'、'.join(_BUILTIN_VALUES)}；可用 + 组合（mla+moe），也可以给 .toml 文件的路径",
    )


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """读 TOML 方案，只返回文件里明确写出的值；键和值当场校验。"""
    try:
        data = tomllib.loads(read_text(path))
    except OSError as error:
        raise DsxError("DSX-E005", f"打不开 {path}：{error.strerror}", "检查路径和读取权限") from error
    except (ValueError, RecursionError) as error:
        todo = "改正语法；文件必须是 UTF-8 编码的 TOML"
        raise DsxError("DSX-E005", f"{path} 不是合法的 TOML：{error}", todo) from error
    _validate(data)
    return data


def _parse_override(item: str) -> tuple[str, str, Any]:
    name, equals, raw = item.partition("=")
    section, _, key = name.strip().partition(".")
    if section not in _SECTIONS or key not in _SECTIONS[section].model_fields:
        raise _unknown_key(name.strip())
    raw = raw.strip()
    if not equals or not raw:
        todo = f"写成 {section}.{key}=值；允许：{_allowed(section, key)}"
        raise DsxError("DSX-E003", f"覆盖项 {item!r} 没有给值", todo)
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return section, key, raw
    return section, key, parsed["value"] if set(parsed) == {"value"} else raw


def _validate(values: Mapping[str, Any]) -> OptimizationProfile:
    """交给 pydantic 校验，把它的第一条错误换成 dsx 的错误码。"""
    try:
        return OptimizationProfile.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            raise _unknown_key(".".join(loc)) from error
        allowed = _allowed(*loc[:2]) if len(loc) > 1 else f"一张表（[{loc[0]}]）"
        what = f"{'.'.join(loc)} 的值 {_show(first['input'])} 不允许"
        raise DsxError("DSX-E003", what, f"允许：{allowed}") from error


def _unknown_key(name: str) -> DsxError:
    todo = f"{did_you_mean(name, _KEYS)}允许的键：{'、'.join(_KEYS)}"
    return DsxError("DSX-E002", f"方案里没有 {name!r} 这个键", todo)


def _switched_off(section: str, key: str, value: Any) -> DsxError:
    return DsxError(
        "DSX-E004",
        f"{section}.{key}={_show(value)} 不起作用：{section}.enabled=false",
        f"先打开它（-p {section} 或 --set {section}.enabled=true），或去掉 {section}.{key}",
    )


def _allowed(section: str, key: str) -> str:
    """某个键允许的值，写给人看。"""
    info = _SECTIONS[section].model_fields[key]
    if info.annotation is bool:
        return "true、false"
    if get_origin(info.annotation) is Literal:
        return "、".join(get_args(info.annotation))
    low, high = (getattr(bound, name) for bound, name in zip(info.metadata, ("ge", "le"), strict=True))
    return f"{low} 到 {high} 的整数"


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
