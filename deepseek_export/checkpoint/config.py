"""config.json → :class:`ModelConfig`。

拿不准就拒绝：``model_type`` 走白名单，每个字段要么被读取，要么在可忽略表里，要么必须等于固定值，要么取着不起作用的值；
其余字段一律报错并点名。语义以 transformers 5.24 里各家族自己的实现为准；
它与 DeepSeek 原版代码有分歧的取值直接拒绝。
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from deepseek_export.checkpoint.families import (
    CONSUMED_KEYS,
    DERIVED_KEYS,
    FAMILIES,
    FIXED_KEYS,
    IGNORED_KEYS,
    MOE_KEYS,
    Family,
    RopeLayout,
)
from deepseek_export.checkpoint.fields import MAX_DIM, Fields, parse_json, shown
from deepseek_export.checkpoint.indexer_config import IndexerConfig, parse_indexer
from deepseek_export.checkpoint.inert import INERT_KEYS, check_inert
from deepseek_export.checkpoint.int4_config import Int4Config, parse_int4
from deepseek_export.checkpoint.quantization import parse_quantization
from deepseek_export.checkpoint.rope_config import MAX_LENGTH, RopeConfig, parse_rope, yarn_mscale
from deepseek_export.errors import DsxError
from deepseek_export.paths import read_text

#: TensorRT 的目标上 int8 缓存的一行凑整到几个字节：128 位的拷贝。
ROW_ALIGNMENT = 16

_MAX_LAYERS, _MAX_EXPERTS = 1024, 4096


@dataclass(frozen=True)
class ModelConfig:
    """``config.json`` 的类型化视图；字段名沿用 DeepSeek 的叫法，字段间的一致性在解析时已经查过。

    没有 MoE 的家族，专家数是 0，``first_k_dense_replace`` 等于层数。``embed_scale``、``residual_scale``、``logits_divisor``
    是 MiniCPM3 的三个缩放，其余家族都是 1。``router_bias``、``post_mlp_norm`` 见
    :class:`~deepseek_export.checkpoint.families.Family`，只有 A.X-K1 与众不同。
    ``indexer`` 是稀疏注意力的索引器，没有的家族为 ``None``。
    ``weight_block_size`` 是 FP8 检查点每个 scale 管的块（行、列）；不是 FP8 检查点则为 ``None``。
    ``int4`` 是 4 位检查点的声明；不是 4 位的则为 ``None``。
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    rope_layout: RopeLayout
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    scoring_func: Literal["softmax", "sigmoid"]
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_mtp_layers: int
    dtype: Literal["float32", "float16", "bfloat16"]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    weight_block_size: tuple[int, int] | None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    router_bias: bool = True
    post_mlp_norm: bool = False
    indexer: IndexerConfig | None = None
    int4: Int4Config | None = None

    @property
    def qk_head_dim(self) -> int:
        """每个头 q/k 的宽度：``qk_nope_head_dim + qk_rope_head_dim``。"""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """第 ``layer`` 层（从 0 数，MTP 层接着往后数）是不是 MoE 层。"""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def runs_indexer(self, layer: int) -> bool:
        """第 ``layer`` 层（编号同上）自己挑 key 吗；沿用前面一层的、没有稀疏注意力的都不算。MTP 层各有自己的索引器。"""
        if self.indexer is None:
            return False
        return layer >= self.num_hidden_layers or self.indexer.full_layers[layer]

    def chooser_of(self, layer: int) -> int | None:
        """主干第 ``layer`` 层的 key 由哪一层挑：它自己，或前面最近的自己挑的那一层；没有稀疏注意力为 ``None``。"""
        return next((i for i in range(layer, -1, -1) if self.runs_indexer(i)), None)

    @property
    def num_moe_layers(self) -> int:
        """主干里 MoE 层的数目，不含 MTP 层。"""
        return max(self.num_hidden_layers - self.first_k_dense_replace, 0)

    @property
    def softmax_scale(self) -> float:
        """注意力分数的缩放：``qk_head_dim**-0.5``，yarn 再乘 ``(0.1·mscale_all_dim·ln factor + 1)²``。"""
        scale = self.qk_head_dim**-0.5
        if self.rope.rope_type == "yarn" and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    @property
    def group_score(self) -> Literal["none", "max", "top2_sum"]:
        """专家组的打分方式，由 ``topk_method`` 决定。"""
        table = {"greedy": "none", "group_limited_greedy": "max", "noaux_tc": "top2_sum"}
        return cast(Literal["none", "max", "top2_sum"], table[self.topk_method])

    @property
    def latent_cache_values(self) -> int:
        """潜缓存每 token 每层有几个数。"""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def latent_cache_width(self, int8: bool, aligned: bool = False) -> int:
        """潜缓存的一行有几个元素；int8 的行里 latent 各一个码、旋转部分各两个字节、两个 scale 共六个字节。

        Args:
            int8: 缓存是 int8 的。
            aligned: TensorRT 的目标：int8 的行末尾补零到 16 个字节的倍数，见 ``ops/int8_cache.py``。
        """
        if not int8:
            return self.latent_cache_values
        width = self.kv_lora_rank + 2 * self.qk_rope_head_dim + 6
        return math.ceil(width / ROW_ALIGNMENT) * ROW_ALIGNMENT if aligned else width

    def index_cache_width(self, int8: bool) -> int:
        """索引 key 的一行有几个元素：浮点就是 ``index_head_dim``，int8 见 ``ops/int8_index.py``；没有稀疏注意力是 0。"""
        return 0 if self.indexer is None else self.indexer.head_dim + 3 * int8

    @property
    def expanded_cache_values(self) -> int:
        """展开成逐头 K/V 后每 token 每层的元素数。"""
        return self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)


def load_model_config(path: Path) -> ModelConfig:
    """读一个 ``config.json``。

    Args:
        path: ``config.json`` 的路径，或它所在的目录。

    Raises:
        DsxError: ``DSX-E102`` 文件不存在、不是普通文件、太大、不是合法 JSON、顶层不是对象或键重复；
            其余见 :func:`parse_model_config`。
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        data = parse_json(read_text(file))
    except OSError as error:
        raise DsxError(
            "DSX-E102",
            f"打不开 {file}：{error.strerror}",
            "确认检查点目录里的 config.json 是普通文件，有权限读",
        ) from error
    except ValueError as error:
        raise DsxError(
            "DSX-E102", f"{file} 不是合法的 JSON：{error}", "重新下载或改正 config.json"
        ) from error
    if not isinstance(data, dict):
        raise DsxError("DSX-E102", f"{file} 的顶层是 {type(data).__name__}，应为对象", "重新下载 config.json")
    return parse_model_config(data, str(file))


def parse_model_config(data: dict[str, Any], where: str) -> ModelConfig:
    """把 HF 风格的配置字典变成 :class:`ModelConfig`；不读文件。

    Args:
        data: ``config.json`` 的内容，旧式 ``rope_scaling`` 与 transformers 5 的 ``rope_parameters`` 都认。
        where: 来源，写进报错。

    Raises:
        DsxError: ``DSX-E103`` model_type；``E104`` 未知字段；``E105`` 取值；``E106`` 缺字段；``E107`` rope；
            ``E108`` / ``E650`` 量化；``E109`` 路由；``E130`` 稀疏注意力。
    """
    name = data.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        got = "没有 model_type" if name is None else f"model_type 是 {shown(name)}"
        raise DsxError("DSX-E103", f"{where} {got}", f"支持的 model_type：{'、'.join(FAMILIES)}")
    family = FAMILIES[name]
    f = Fields({**family.defaults, **_renamed(Fields(data, where), family.aliases)}, where)
    known = CONSUMED_KEYS | IGNORED_KEYS | DERIVED_KEYS | set(FIXED_KEYS) | set(INERT_KEYS)
    known |= family.extra_keys | set(family.inert)
    f.refuse_unknown(known | MOE_KEYS if family.has_moe else known)
    for key, only in FIXED_KEYS.items():
        f.must_equal(key, only)
    for key, values in family.inert.items():
        f.must_equal(key, *values)
    sparse = family.indexer_layout is not None
    check_inert(f, [*family.inert, *(["layer_types"] if sparse else [])])
    heads = f.integer("num_attention_heads")
    nope, rope_dim = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
    f.must_equal("num_key_value_heads", heads)
    f.must_equal("qk_head_dim", nope + rope_dim)
    rank = f.integer("kv_lora_rank")
    head_dims = [rope_dim, nope + rope_dim]
    head_dims += [rank + rope_dim] * family.latent_head_dim + [nope] * family.nope_head_dim
    f.must_equal("head_dim", *head_dims)
    if rope_dim % 2:
        raise f.bad("qk_rope_head_dim", "偶数")
    interleave = "rope_interleave" not in family.extra_keys or f.boolean("rope_interleave", default=True)
    length = f.integer("max_position_embeddings", high=MAX_LENGTH)
    dtype_key = "dtype" if f.data.get("dtype") is not None else "torch_dtype"
    if len({f.data[key] for key in ("dtype", "torch_dtype") if isinstance(f.data.get(key), str)}) > 1:
        raise f.bad("dtype", f"与 torch_dtype（{f.data['torch_dtype']!r}）一致")
    eos = f.data.get("eos_token_id")
    eos_list = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < MAX_DIM for token in eos_list):
        raise f.bad("eos_token_id", "非负整数、非负整数列表或 null")
    has_mtp = f.data.get("num_nextn_predict_layers") is not None
    hidden, layers = f.integer("hidden_size"), f.integer("num_hidden_layers", high=_MAX_LAYERS)
    return ModelConfig(
        family=name,
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=f.optional_integer("q_lora_rank", low=1, required=True),
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=_v_head_dim(f, name, hidden, heads),
        rms_norm_eps=f.positive("rms_norm_eps"),
        attention_bias=f.boolean("attention_bias"),
        tie_word_embeddings=f.boolean("tie_word_embeddings"),
        max_position_embeddings=length,
        rope=parse_rope(f, length, rope_dim, family.rope_types),
        rope_layout=family.rope_layout if interleave else "half",
        num_mtp_layers=f.integer("num_nextn_predict_layers", low=0, high=_MAX_LAYERS) if has_mtp else 0,
        dtype=cast(Any, f.choice(dtype_key, ("float32", "float16", "bfloat16"))),
        bos_token_id=f.optional_integer("bos_token_id"),
        eos_token_ids=tuple(eos_list),
        pad_token_id=f.optional_integer("pad_token_id", low=-1),
        weight_block_size=parse_quantization(f),
        router_bias=family.router_bias,
        post_mlp_norm=family.post_mlp_norm,
        indexer=parse_indexer(f, family, layers, rope_dim) if sparse else None,
        int4=parse_int4(f),
        **(_parse_moe(f, family, layers) if family.has_moe else _DENSE | {"first_k_dense_replace": layers}),
        **(_parse_scales(f, hidden, layers) if "scale_emb" in family.extra_keys else {}),
    )


def _renamed(f: Fields, aliases: Mapping[str, str]) -> dict[str, Any]:
    """别名换成正名；一个字段有几种名字、取值不同的拒绝，null 等于没有写。"""
    renamed: dict[str, Any] = {}
    for key, value in f.data.items():
        proper = aliases.get(key, key)
        if renamed.get(proper) is None:
            renamed[proper] = value
        else:
            f.must_equal(key, renamed[proper])
    return renamed


#: 没有 MoE 的家族：这些字段不起作用，取中性值。
_DENSE: dict[str, Any] = {
    "moe_intermediate_size": 0,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}


def _v_head_dim(f: Fields, family: str, hidden: int, heads: int) -> int:
    """``v_head_dim``；MiniCPM3 可以不写，那时是 ``hidden_size / num_attention_heads``。"""
    if family != "minicpm3" or f.data.get("v_head_dim") is not None:
        return f.integer("v_head_dim")
    if hidden % heads:
        raise f.bad("num_attention_heads", f"能整除 hidden_size（{hidden}）的数，否则要写明 v_head_dim")
    return hidden // heads


def _parse_scales(f: Fields, hidden: int, layers: int) -> dict[str, Any]:
    """MiniCPM3 的三个缩放；``scale_depth``、``dim_model_base`` 为 null 表示不缩放。"""
    scales = {"embed_scale": f.positive("scale_emb")}
    if f.require("scale_depth") is not None:
        scales["residual_scale"] = f.positive("scale_depth") / math.sqrt(layers)
    if f.require("dim_model_base") is not None:
        scales["logits_divisor"] = hidden / f.integer("dim_model_base")
    return scales


def _parse_moe(f: Fields, family: Family, layers: int) -> dict[str, Any]:
    """专家的尺寸、哪些层是 MoE，以及路由。"""
    return {
        "moe_intermediate_size": f.integer("moe_intermediate_size"),
        "n_shared_experts": f.optional_integer("n_shared_experts", required=True, high=_MAX_EXPERTS) or 0,
        "first_k_dense_replace": _dense_layers(f, family, layers),
        **_parse_routing(f, family),
    }


def _dense_layers(f: Fields, family: Family, layers: int) -> int:
    """前多少层是 dense。

    GLM、A.X-K1 可以由 ``mlp_layer_types`` 逐层列出。没有列的，GLM 第一层 dense（transformers 不读它的 ``first_k_dense_replace``），
    其余看 ``first_k_dense_replace``；两者不一致就拒绝。
    """
    types, dense = f.data.get("mlp_layer_types"), family.dense_layers or 0
    if types is None and family.dense_layers is None:
        return f.integer("first_k_dense_replace", low=0)
    if types is not None:
        dense = (
            next((i for i, kind in enumerate(types) if kind != "dense"), layers)
            if isinstance(types, list)
            else 0
        )
        if types != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise f.bad("mlp_layer_types", f" {layers} 项的列表，先是若干 dense，其余全是 sparse")
    f.must_equal("first_k_dense_replace", dense)
    return dense


def _parse_routing(f: Fields, family: Family) -> dict[str, Any]:
    """读路由字段并查一致性；一切问题都是 ``DSX-E109``（专家数本身除外）。"""
    code = "DSX-E109"
    experts = f.integer("n_routed_experts", high=_MAX_EXPERTS)
    top_k = f.integer("num_experts_per_tok", code=code)
    method = f.choice("topk_method", family.topk_methods, family.topk_methods[0], code)
    scoring = f.choice("scoring_func", (family.scoring_func,), family.scoring_func, code)
    norm = f.boolean("norm_topk_prob", default=None if family.honours_norm_topk_prob else False, code=code)
    if norm and not family.honours_norm_topk_prob:
        only = " false，因为 transformers 忽略它，DeepSeek 原版代码却会归一化，两边结果不同"
        raise f.bad("norm_topk_prob", only, code)
    groups = chosen = 1
    if method != "greedy":
        groups, chosen = f.integer("n_group", code=code), f.integer("topk_group", code=code)
        if experts % groups:
            raise f.bad("n_group", f"能整除 n_routed_experts（{experts}）的数", code)
        if chosen > groups:
            raise f.bad("topk_group", f"不超过 n_group（{groups}）", code)
        if method == "noaux_tc" and experts // groups < 2:
            raise f.bad(
                "n_group", f"每组至少两个专家（n_routed_experts 是 {experts}）：组分是前两名之和", code
            )
    if top_k > chosen * (experts // groups):
        raise f.bad("num_experts_per_tok", f"不超过可选专家数 {chosen * (experts // groups)}", code)
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "scoring_func": scoring,
        "topk_method": method,
        "n_group": groups,
        "topk_group": chosen,
        "norm_topk_prob": norm,
        "routed_scaling_factor": f.positive("routed_scaling_factor", code=code),
    }
