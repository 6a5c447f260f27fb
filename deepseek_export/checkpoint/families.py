"""模型家族白名单，以及 config.json 字段的分类表：只有数据，没有逻辑。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

RopeLayout = Literal["interleaved", "deinterleaved", "half"]


@dataclass(frozen=True)
class Family:
    """一个 ``model_type`` 与其他家族的全部差别；架构相同的新家族只需再加一行数据。"""

    rope_layout: RopeLayout  # rope_interleave 缺省时的布局
    transformers_type: str  # transformers 里实现它的 model_type
    scoring_func: str = ""
    topk_methods: tuple[str, ...] = ()  # 第一个是缺省值；空表示这个家族没有 MoE 层
    honours_norm_topk_prob: bool = True
    router_bias: bool = True  # noaux_tc 的选择偏置在不在检查点里；不在的按零算
    post_mlp_norm: bool = False  # MoE 层的输出再过一个 RMSNorm 才加回残差
    extra_keys: frozenset[str] = frozenset()  # 只有这个家族才认的字段
    aliases: Mapping[str, str] = field(default_factory=dict)  # config.json 里的别名 -> 正名
    defaults: Mapping[str, Any] = field(default_factory=dict)  # 官方 config.json 省略的字段，取自家族的配置类
    inert: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # 只有它才写的字段 -> 不起作用的取值
    rope_types: Mapping[str, str] = field(default_factory=dict)  # rope 类型的别名 -> 正名
    latent_head_dim: bool = False  # head_dim 可以写成潜缓存一行的宽度
    nope_head_dim: bool = False  # head_dim 可以写成 qk_nope_head_dim
    indexer_layout: RopeLayout | None = None  # 稀疏注意力的索引器怎么旋转；None 表示没有索引器
    shares_indices: bool = False  # 有的层可以沿用前面一层选的 key
    dense_layers: int | None = None  # 没有 mlp_layer_types 时前几层 dense；None 表示看 first_k_dense_replace

    @property
    def has_moe(self) -> bool:
        """有没有 MoE 层；没有的家族连 MoE 的字段都不认。"""
        return bool(self.topk_methods)


_V3 = Family(
    rope_layout="deinterleaved",
    transformers_type="deepseek_v3",
    scoring_func="sigmoid",
    topk_methods=("noaux_tc",),
    extra_keys=frozenset({"rope_interleave", "num_nextn_predict_layers"}),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)

_V32 = replace(
    _V3,
    transformers_type="deepseek_v32",
    extra_keys=frozenset(
        {
            *("num_nextn_predict_layers", "mlp_layer_types", "layer_types"),
            *("index_topk", "index_head_dim", "index_n_heads", "indexer_rope_interleave"),
        }
    ),
    inert={"rope_interleave": (True,)},  # transformers 的这两个实现总是成对的
    indexer_layout="half",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek_v2": Family(
            rope_layout="interleaved",
            transformers_type="deepseek_v2",
            scoring_func="softmax",
            topk_methods=("greedy", "group_limited_greedy"),
            honours_norm_topk_prob=False,
            aliases={"num_experts": "n_routed_experts"},
        ),
        "deepseek_v3": _V3,
        # 架构就是 deepseek_v3，只是 model_type 另起了名字；transformers 没有单独的实现。
        "kimi_k2": _V3,
        # GLM-4.7-Flash：注意力、路由与 V3 相同，dense 层由 mlp_layer_types 指定。
        "glm4_moe_lite": replace(
            _V3,
            transformers_type="glm4_moe_lite",
            extra_keys=_V3.extra_keys | {"mlp_layer_types"},
            dense_layers=1,
        ),
        # Sarvam-105B：架构就是 V3（没有 q_lora），config.json 的字段另起了名字。发布的没有写 n_group、topk_group：厂商提交给 vLLM 的
        # 说明与 transformers 都是不分组；随检查点发布的远程代码缺省分 16 组选 2 组，是它的缺陷。
        "sarvam_mla": replace(
            _V3,
            transformers_type="sarvam_mla",
            aliases={
                **_V3.aliases,
                "num_experts": "n_routed_experts",
                "num_shared_experts": "n_shared_experts",
                "moe_shared_expert_intermediate_size": "moe_intermediate_size",
                "q_head_dim": "qk_head_dim",
            },
            defaults={
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": True,
                "attention_bias": False,
            },
            # 厂商与 transformers 的注意力都不读 use_qk_norm；两个 dropout 只在训练时起作用，发布的就是 0。
            inert={
                "use_qk_norm": (True, False),
                "moe_router_enable_expert_bias": (True,),
                "default_theta": (10000.0,),
                "embedding_dropout": (0.0,),
                "output_dropout": (0.0,),
            },
            rope_types={"deepseek_yarn": "yarn"},
            latent_head_dim=True,
        ),
        # A.X-K1：V3 加一个 post_mlp_layernorm；检查点不存路由的偏置。
        "axk1": replace(
            _V3,
            transformers_type="axk1",
            router_bias=False,
            post_mlp_norm=True,
            extra_keys=_V3.extra_keys | {"mlp_layer_types"},
        ),
        # DeepSeek-V3.2：V3 的注意力加一个索引器，只看它挑出的 key。transformers 的实现总有 q_lora，没有 rope_interleave。
        "deepseek_v32": _V32,
        # GLM-5：同上，索引器的 RoPE 成对，有的层沿用前面一层选的 key。发布的 head_dim 是 qk_nope_head_dim，没有人用它。
        "glm_moe_dsa": replace(
            _V32,
            transformers_type="glm_moe_dsa",
            extra_keys=_V32.extra_keys
            | {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"},
            # 路由总是 float32；index_share_for_mtp_iteration 只影响草稿，见 specs/dsa。
            inert={
                **_V32.inert,
                "moe_router_dtype": ("float32",),
                "index_share_for_mtp_iteration": (True, False),
            },
            nope_head_dim=True,
            indexer_layout="deinterleaved",
            shares_indices=True,
        ),
        # Youtu-LLM：V3 的注意力，没有 MoE。
        "youtu": Family(
            rope_layout="deinterleaved",
            transformers_type="youtu",
            extra_keys=frozenset({"rope_interleave"}),
        ),
        # MiniCPM3：前后两半的 RoPE，没有 MoE；词嵌入、残差、logits 各有一个缩放。
        "minicpm3": Family(
            rope_layout="half",
            transformers_type="minicpm3",
            extra_keys=frozenset({"scale_emb", "scale_depth", "dim_model_base"}),
            defaults={"attention_bias": False, "tie_word_embeddings": True, "rope_theta": 10000.0},
        ),
    }
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONSUMED_KEYS = _words(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads q_lora_rank "
    "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rms_norm_eps attention_bias tie_word_embeddings "
    "max_position_embeddings rope_theta rope_scaling rope_parameters dtype torch_dtype bos_token_id "
    "eos_token_id pad_token_id quantization_config"
)
MOE_KEYS = _words(
    "moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok first_k_dense_replace "
    "scoring_func topk_method n_group topk_group norm_topk_prob routed_scaling_factor"
)
# 不影响推理结果：训练超参、HF 的记账字段、输出选项。
IGNORED_KEYS = _words(
    "architectures auto_map transformers_version initializer_range embedding_initializer_range use_cache attention_dropout seq_aux "
    "aux_loss_alpha ep_size output_router_logits _name_or_path name_or_path _attn_implementation "
    "_attn_implementation_autoset attn_implementation return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward id2label label2id problem_type task_specific_params finetuning_task "
    "tokenizer_class prefix torchscript use_bfloat16 _commit_hash"
)
# 只支持一个取值；None 与缺省等同。
FIXED_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "partial_rotary_factor": 1,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "pruned_heads": {},
    }
)
DERIVED_KEYS = frozenset({"num_key_value_heads", "head_dim", "qk_head_dim"})  # 必须与其他字段一致
ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
LONGROPE_KEYS = _words("short_factor long_factor factor original_max_position_embeddings attention_factor")
YARN_KEYS = _words(
    "factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim attention_factor "
    "truncate"
)
