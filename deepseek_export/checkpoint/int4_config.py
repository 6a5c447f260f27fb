"""config.json 的 ``quantization_config``：三种已发布的 4 位权重，``compressed-tensors``、AWQ、GPTQ。

只收 4 位、分组、只量化权重的；别的变体（3、8 位，激活、KV 缓存也量化，marlin、exllama、gemv 等另一种排布）按名字拒绝。
字节怎么排见 :mod:`~deepseek_export.checkpoint.int4_weights`。
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, cast

from deepseek_export.checkpoint.fields import Fields, shown
from deepseek_export.errors import DsxError

Int4Method = Literal["compressed-tensors", "awq", "gptq"]
INT4_METHODS: tuple[Int4Method, ...] = ("compressed-tensors", "awq", "gptq")

_CODE = "DSX-E650"
_GROUPS = (32, 64, 128)
_ANY_LINEAR = "Linear"
_REGEX = "re:"
#: 认得的正则：字面、``.``、``.*``、``\d+``、字面的选择。量词不多，也不套量词；选择里没有通配、没有空的、不重复，所以回溯有界。
_TOKENS = re.compile(r"[\w\-/]|\\[.\-_]|\\d\+?|\[0-9\]\+?|\.[*+]?|\(\?:|[()|^$]")
_GROUP = re.compile(r"\((?:\?:)?([^()]*)\)")
_MAX_STARS, _MAX_REGEXES, _MAX_REGEX = 3, 64, 256

# 与反量化无关的字段：怎么量化出来的、用哪个 kernel、谁写的。
_HISTORY: Mapping[Int4Method, tuple[str, ...]] = MappingProxyType(
    {
        "compressed-tensors": ("global_compression_ratio", "version", "run_compressed", "dequantize"),
        "awq": ("exllama_config", "fuse_max_seq_len"),
        "gptq": (
            *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse", "dataset"),
            *("tokenizer", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block"),
            *("modules_in_block_to_quantize", "batch_size", "pad_token_id", "max_input_length"),
            *("cache_block_outputs", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config"),
            *("model_name_or_path", "model_file_base_name", "quantizer", "meta", "uri", "act_group_aware"),
            "backend",
        ),
    }
)


@dataclass(frozen=True)
class Int4Layout:
    """一种 4 位权重怎么还原；写进配方。

    Attributes:
        method: 哪一种排布。
        group: 每多少个输入维共用一个 scale 与零点。
        symmetric: 零点总是 8。
        act_order: 每个输入维属于哪一组另有一张表（``g_idx``），次序任意。
        minus_one: 存的零点少 1（GPTQ v1）。
    """

    method: Int4Method
    group: int
    symmetric: bool
    act_order: bool = False
    minus_one: bool = False


@dataclass(frozen=True)
class Int4Config:
    """4 位检查点的声明。

    Attributes:
        layout: 怎么还原。
        targets: 声明量化的模块：名字、``re:`` 开头的正则，``Linear`` 是全部线性层。
        ignore: 其中不量化的，写法同上；AWQ 的是名字里含有的一段。
    """

    layout: Int4Layout
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    @property
    def title(self) -> str:
        """一行说明，例如 ``compressed-tensors，int4，每 32 个一组，对称``。"""
        layout = self.layout
        kind = "对称" if layout.symmetric else "有零点"
        order = "，组的次序任意" if layout.act_order else ""
        return f"{layout.method}，int4，每 {layout.group} 个一组，{kind}{order}"

    def declares(self, module: str) -> bool | None:
        """声明说这个线性层是不是 4 位；没有说（GPTQ 不逐个列出）是 ``None``。"""
        if self.layout.method == "gptq":
            return None if module != "lm_head" else "lm_head" in self.targets
        if self.layout.method == "awq":
            return self._declared_by_awq(module)
        return self._targets.has(module) and not self._ignored.has(module)

    def _declared_by_awq(self, module: str) -> bool | None:
        """AutoAWQ 按子串看，transformers 按点分的段看；两家说法不一的不算声明过。"""
        if module == "lm_head" or any(f".{one}." in f".{module}." for one in self.ignore):
            return False
        return None if any(one in module for one in self.ignore) else True

    @cached_property
    def _targets(self) -> _Names:
        return _Names.of(self.targets)

    @cached_property
    def _ignored(self) -> _Names:
        return _Names.of(self.ignore)


@dataclass(frozen=True)
class _Names:
    """一张模块名的单子。"""

    exact: frozenset[str]
    regexes: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> _Names:
        listed = list(names)
        regexes = (re.compile(name.removeprefix(_REGEX)) for name in listed if name.startswith(_REGEX))
        return cls(frozenset(listed), tuple(regexes))

    def has(self, module: str) -> bool:
        """同 compressed-tensors：正则从头匹配，名字要全等。"""
        if _ANY_LINEAR in self.exact or module in self.exact:
            return True
        return any(regex.match(module) for regex in self.regexes)


def parse_int4(f: Fields) -> Int4Config | None:
    """读 ``quantization_config``；不是 4 位的三种之一为 ``None``，由 :mod:`~deepseek_export.checkpoint.quantization` 认。

    Args:
        f: 整个 config.json。

    Raises:
        DsxError: ``DSX-E650``，是三种之一，而其中有不支持的变体、不认识的字段。
    """
    data = f.data.get("quantization_config")
    method = data.get("quant_method") if isinstance(data, dict) else None
    if not isinstance(data, dict) or method not in INT4_METHODS:
        return None
    q = Fields(data, f"{f.where} 的 quantization_config")
    return _PARSERS[cast(Int4Method, method)](q)


def _compressed_tensors(q: Fields) -> Int4Config:
    _known(q, "compressed-tensors", "format", "config_groups", "ignore", "kv_cache_scheme")
    _only(q, "format", "pack-quantized")
    _only(q, "quantization_status", "compressed")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        _empty(q, key)
    groups = q.data.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise q.bad("config_groups", "恰好一组（各层位数不同的不支持）", _CODE)
    ((name, value),) = groups.items()
    group = _nested(q, f"config_groups.{shown(name)}", value)
    group.refuse_unknown(("targets", "weights", "input_activations", "output_activations", "format"), _CODE)
    for key in ("input_activations", "output_activations"):
        _empty(group, key)
    _only(group, "format", "pack-quantized")
    weights = _nested(group, "weights", group.data.get("weights"))
    history = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    known = (
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "group_size",
        "block_structure",
        "dynamic",
        "actorder",
    )
    weights.refuse_unknown((*known, *history), _CODE)
    _bits(weights, "num_bits")
    _must(weights, "type", "int")
    _must(weights, "strategy", "group")
    _only(weights, "dynamic", False)
    _empty(weights, "block_structure")
    _only(weights, "actorder", "group", "dynamic", "weight", "static")
    layout = Int4Layout(
        "compressed-tensors",
        _group_size(weights, "group_size"),
        weights.boolean("symmetric", default=True, code=_CODE),
        act_order=weights.data.get("actorder") in ("group", "dynamic"),
    )
    targets = _names(group, "targets")
    if not targets:
        raise group.bad("targets", "至少一项", _CODE)
    return Int4Config(layout, targets, _names(q, "ignore"))


def _awq(q: Fields) -> Int4Config:
    bits = "w_bit" if "bits" not in q.data else "bits"
    group = "q_group_size" if "group_size" not in q.data else "group_size"
    own = (
        "zero_point",
        "version",
        "backend",
        "modules_to_not_convert",
        "do_fuse",
        "modules_to_fuse",
        "format",
    )
    _known(q, "awq", bits, group, *own)
    _bits(q, bits)
    _only(q, "version", "gemm", "GEMM")
    _only(q, "format", "gemm")
    _only(q, "backend", "autoawq", "auto")
    _must(q, "zero_point", True)
    _only(q, "do_fuse", False)
    _empty(q, "modules_to_fuse")
    layout = Int4Layout("awq", _group_size(q, group), symmetric=False)
    return Int4Config(layout, (_ANY_LINEAR,), _names(q, "modules_to_not_convert", regexes=False))


def _gptq(q: Fields) -> Int4Config:
    form = "checkpoint_format" if q.data.get("checkpoint_format") is not None else "format"
    own = ("checkpoint_format", "format", "is_marlin_format", "desc_act", "sym", "dynamic", "lm_head")
    _known(q, "gptq", "bits", "group_size", *own, "pack_dtype", "adapter", "rotation")
    _bits(q, "bits")
    _only(q, "checkpoint_format", "gptq", "gptq_v2")
    _only(q, "format", "gptq", "gptq_v2")
    _only(q, "is_marlin_format", False)
    _only(q, "pack_dtype", "int32")
    for key in ("dynamic", "adapter", "rotation"):
        _empty(q, key)
    layout = Int4Layout(
        "gptq",
        _group_size(q, "group_size"),
        symmetric=q.boolean("sym", default=True, code=_CODE),
        act_order=q.boolean("desc_act", default=False, code=_CODE),
        minus_one=q.data.get(form) != "gptq_v2",
    )
    head = ("lm_head",) if q.boolean("lm_head", default=False, code=_CODE) else ()
    return Int4Config(layout, head, ())


_PARSERS = MappingProxyType({"compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq})


def _known(q: Fields, method: Int4Method, *keys: str) -> None:
    """不认识的字段按名字拒绝。"""
    shared = ("quant_method", "quantization_status", "sparsity_config", "transform_config")
    extra = shared if method == "compressed-tensors" else shared[:1]
    q.refuse_unknown((*extra, *keys, *_HISTORY[method]), _CODE)


def _only(q: Fields, key: str, *allowed: Any) -> None:
    """可以不写；写了就只能是这几个。"""
    q.must_equal(key, *allowed, code=_CODE)


def _must(q: Fields, key: str, *allowed: Any) -> None:
    """不能不写。"""
    if q.data.get(key) is None:
        raise q.bad(key, " " + " 或 ".join(repr(one) for one in allowed), _CODE)
    _only(q, key, *allowed)


def _empty(q: Fields, key: str) -> None:
    """只能不写、null 或空对象：写了就是另一种格式。"""
    if q.data.get(key) not in (None, {}):
        raise q.bad(key, " null：dsx 只读量化了权重、而激活与 KV 缓存都没有量化的检查点", _CODE)


def _bits(q: Fields, key: str) -> None:
    if type(q.data.get(key)) is not int or q.data[key] != 4:
        raise q.bad(key, " 4；别的位数没有对应的算子", _CODE)


def _group_size(q: Fields, key: str) -> int:
    value = q.data.get(key)
    if type(value) is not int or value not in _GROUPS:
        raise q.bad(key, f" {'、'.join(map(str, _GROUPS))} 之一，与 int4 算子的块相同", _CODE)
    return value


def _nested(q: Fields, key: str, value: Any) -> Fields:
    if not isinstance(value, dict):
        raise DsxError(_CODE, f"{q.where} 的 {key} 是 {shown(value)}", f"{key} 应为对象")
    return Fields(value, f"{q.where}.{key}")


def _names(q: Fields, key: str, regexes: bool = True) -> tuple[str, ...]:
    """模块名的单子；正则先看是不是认得的写法。"""
    value = q.data.get(key)
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise q.bad(key, "字符串列表", _CODE)
    patterns = [name.removeprefix(_REGEX) for name in names if regexes and name.startswith(_REGEX)]
    if len(patterns) > _MAX_REGEXES:
        raise q.bad(key, f"至多 {_MAX_REGEXES} 个正则", _CODE)
    for pattern in patterns:
        if not _bounded(pattern):
            raise DsxError(
                _CODE,
                f"{q.where} 的 {key} 里的正则 {shown(pattern)} 不是 dsx 认得的写法",
                f"只用字面、\\.、.*、\\d+ 与 (a|b)，.* 至多 {_MAX_STARS} 个；或改成逐个列出模块名",
            )
    return tuple(names)


def _bounded(pattern: str) -> bool:
    """整个由认得的写法拼成，量词不多，而且编译得过。"""
    if len(pattern) > _MAX_REGEX or _TOKENS.sub("", pattern):
        return False
    branches = [group.split("|") for group in _GROUP.findall(pattern)]
    if set(_GROUP.sub("", pattern)) & set("()") or not all(map(_distinct, branches)):
        return False
    tokens = _TOKENS.findall(pattern)
    if sum(token.endswith(("*", "+")) for token in tokens) > _MAX_STARS:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _distinct(branches: list[str]) -> bool:
    """选择的各支不空、不重复，没有通配。"""
    plain = [re.sub(r"\\.", "", branch) for branch in branches]
    return all(branches) and len(set(branches)) == len(branches) and not set("".join(plain)) & set(".*+[")
