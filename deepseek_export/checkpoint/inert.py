"""取某些值时不改变推理结果的字段：逐个列出字段、值与理由；别的值照样拒绝。

训练框架与 transformers 会把与架构无关的开关、生成的缺省值、自己的记账写进 ``config.json``。关着的开关与缺省值不起作用；
打开了、改过了的，dsx 没有实现，当作没看见就会算出别的结果。
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from deepseek_export.checkpoint.fields import Fields


@dataclass(frozen=True)
class Inert:
    """一个字段什么时候不起作用；null 总是等同没有写。

    Attributes:
        accepts: 这个值不起作用吗。
        want: 不起作用的值，写进报错。
        why: 理由，写进报错。
    """

    accepts: Callable[[Any], bool]
    want: str
    why: str


def check_inert(f: Fields, also: Collection[str] = ()) -> None:
    """表里的字段都取着不起作用的值；``also`` 是家族自己另有规定的，不看这张表。

    Raises:
        DsxError: ``DSX-E105``，有一个不是。
    """
    for key, inert in INERT_KEYS.items():
        value = f.data.get(key)
        if value is not None and key not in also and not inert.accepts(value):
            raise f.bad(key, f"{inert.want}：{inert.why}")


def _at(why: str, **values: Any) -> dict[str, Inert]:
    """只有一个值不起作用；``True`` 与 ``1`` 不算同一个。"""

    def same(only: Any) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, bool) == isinstance(only, bool) and value == only

    shown = {True: "true", False: "false"}
    return {key: Inert(same(only), f" {shown.get(only, only)}", why) for key, only in values.items()}


def _kind(want: str, why: str, accepts: Callable[[Any], bool], *keys: str) -> dict[str, Inert]:
    return {key: Inert(accepts, want, why) for key in keys}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


#: 字段 → 什么时候不起作用。
INERT_KEYS: Mapping[str, Inert] = MappingProxyType(
    _at("dsx 没有滑动窗口，每个位置都看得见全部前文", use_sliding_window=False)
    # sliding_window 本身不在表里：是 null 就等于没有写，有值的一律不认识。
    # 只在 use_sliding_window 为 true 时才读，而那已经被拒绝。
    | _kind("非负整数", "它是从第几层起用滑动窗口，而窗口总是关着的", _is_count, "max_window_layers")
    | _kind(
        " full_attention 的列表",
        "dsx 的每一层都是完整的注意力",
        lambda value: isinstance(value, list) and all(kind == "full_attention" for kind in value),
        "layer_types",
    )
    # transformers 4 把不同于缺省的生成参数写进 config.json，5 搬进 generation_config.json；缺省值等于没写。
    # dsx 的采样只看命令行与 API 的参数，别的值会被悄悄丢掉。
    | _at(
        "dsx 不从 config.json 读生成参数，别的值不会起作用；删掉它，生成时用 dsx generate 的选项给",
        max_length=20,
        min_length=0,
        do_sample=False,
        early_stopping=False,
        num_beams=1,
        num_beam_groups=1,
        diversity_penalty=0.0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        num_return_sequences=1,
        output_scores=False,
        return_dict_in_generate=False,
        remove_invalid_values=False,
    )
    # 编码器-解码器模型的开关；is_encoder_decoder 必须是 false。
    | _at("dsx 只支持没有编码器的模型", is_decoder=False, tie_encoder_decoder=False)
    | _at("只影响 TensorFlow 的损失函数", tf_legacy_loss=False)
    | _at("dsx 的注意力不在 q、k 上另加 norm", use_qk_norm=False, qk_layernorm=False)
    # 训练时才有：丢弃、辅助损失、路由的扰动。
    | _kind(
        "数",
        "只在训练时起作用",
        _is_number,
        *("embd_pdrop", "resid_pdrop", "hidden_dropout", "router_aux_loss_coef", "router_z_loss_coef"),
        "router_jitter_noise",
    )
    # unsloth 的记账：修过没有、用的哪一版。
    | _kind("字符串", "unsloth 记的版本", lambda value: isinstance(value, str), "unsloth_version")
    | _kind(" true 或 false", "unsloth 记的修过没有", lambda value: isinstance(value, bool), "unsloth_fixed")
)
