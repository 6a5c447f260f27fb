"""一个模型有多少参数、每个 token 用到多少、缓存多大：全部由 config.json 算出。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek_export.checkpoint import ModelConfig, expected_mtp_tensors, expected_tensors
from deepseek_export.dtypes import DTYPES
from deepseek_export.profile import OptimizationProfile

#: 参数按用法来分：``embed`` 只查表，``kv_b`` 在 absorb 形式里不是线性层，``experts`` 只读被选中的，``small`` 是 router、索引器各头的权重与一维的张量。
Part = Literal["embed", "head", "layers", "kv_b", "experts", "small"]
PARTS: tuple[Part, ...] = ("embed", "head", "layers", "kv_b", "experts", "small")


@dataclass(frozen=True)
class ModelShape:
    """参数个数与每个 token 的代价。

    Attributes:
        config: 模型配置。
        parameters: 各部分的参数个数；打开 MTP 时含 MTP 模块（词嵌入与 lm_head 只算主模型的一份）。
        cached_layers: 有缓存的层数；打开 MTP 时含 MTP 模块。
        index_layers: 其中自己给每个 query 挑 key 的层数；没有稀疏注意力是 0。
        latent: 缓存的是潜向量（``mla.enabled``），还是逐头 K/V。
        sparse: 只跑被选中的专家（``moe.enabled``），还是全部。
        absorb_prefill: prefill 的注意力也用 absorb 形式（``mla.form`` 是 ``absorb``）。
        index_int8: 索引 key 存成 int8（``dsa.index_cache_dtype``）。
    """

    config: ModelConfig
    parameters: Mapping[Part, int]
    cached_layers: int
    index_layers: int
    latent: bool
    sparse: bool
    absorb_prefill: bool
    index_int8: bool

    @classmethod
    def build(cls, config: ModelConfig, profile: OptimizationProfile, modules: int) -> ModelShape:
        """``modules`` 是检查点里的 MTP 模块数，``profile`` 没有打开 MTP 时不算。"""
        modules = modules if profile.mtp.enabled else 0
        shapes = expected_tensors(config)
        for index in range(modules):
            shapes |= {
                name: shape
                for name, shape in expected_mtp_tensors(config, index).items()
                if not name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
            }
        parameters: dict[Part, int] = dict.fromkeys(PARTS, 0)
        for name, shape in shapes.items():
            parameters[part_of(name, shape)] += math.prod(shape)
        layers = config.num_hidden_layers + modules
        latent = profile.mla.enabled
        absorb_prefill = latent and profile.mla.form == "absorb"
        indexed = sum(map(config.runs_indexer, range(layers)))
        int8 = profile.dsa.index_cache_dtype == "int8"
        return cls(config, parameters, layers, indexed, latent, profile.moe.enabled, absorb_prefill, int8)

    @property
    def total(self) -> int:
        """全部参数。"""
        return sum(self.parameters.values())

    def experts_read(self, tokens: float) -> float:
        """``tokens`` 个 token 平均读到多大比例的路由专家（假设路由均匀、各 token 独立）。"""
        c = self.config
        if not self.parameters["experts"] or not self.sparse:
            return 1.0
        return 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens

    def weights_read(self, parts: Mapping[Part, float], tokens: float, *, tied: bool = False) -> float:
        """解码 ``tokens`` 个 token 的一步读多少字节的权重：路由专家只读命中的，词嵌入只查几行，其余各读一遍。

        Args:
            parts: 各部分有多少字节。
            tokens: 一步几个 token。
            tied: 词嵌入也当 lm_head 读一遍。
        """
        share: dict[Part, float] = {"embed": float(tied), "experts": self.experts_read(tokens)}
        return sum(parts[part] * share.get(part, 1.0) for part in PARTS)

    def rows_read(self, context: int) -> int:
        """注意力在 ``context`` 个 token 里看几个：稀疏注意力只看选中的。"""
        topk = None if self.config.indexer is None else self.config.indexer.topk
        return context if topk is None else min(context, topk)

    @property
    def active(self) -> int:
        """每个 token 参与矩阵乘的参数。"""
        return sum(round(self.active_in(part)) for part in PARTS)

    def active_in(self, part: Part) -> float:
        """一部分里每个 token 参与矩阵乘的参数；不兼作 lm_head 的词嵌入只是查表，不算。"""
        c, count = self.config, self.parameters[part]
        if part == "embed" and not c.tie_word_embeddings:
            return 0
        if part == "experts" and self.sparse and c.n_routed_experts:
            return count * c.num_experts_per_tok / c.n_routed_experts
        return count

    def latent_cache_values(self, int8: bool) -> int:
        """每个 token 在所有层的潜缓存里占几个元素。"""
        return self.cached_layers * self.config.latent_cache_width(int8)

    @property
    def expanded_cache_values(self) -> int:
        """每个 token 在所有层的展开的缓存里占几个元素。"""
        return self.cached_layers * self.config.expanded_cache_values

    @property
    def index_cache_values(self) -> int:
        """每个 token 在所有层的索引缓存里占几个元素；没有稀疏注意力是 0。"""
        return self.index_layers * self.config.index_cache_width(self.index_int8)

    def cache_bytes_per_token(self, dtype: str, model_dtype: str) -> tuple[int, int]:
        """每个 token 的缓存多少字节：潜向量的、展开的；展开的没有 int8 这一种，按模型的 dtype 算，索引 key 另有自己的开关。"""
        int8 = dtype == "int8"
        wide = DTYPES[model_dtype if int8 else dtype]
        index = (DTYPES["int8"] if self.index_int8 else wide).nbytes(self.index_cache_values)
        latent = DTYPES[dtype].nbytes(self.latent_cache_values(int8))
        return latent + index, wide.nbytes(self.expanded_cache_values) + index

    def attention_flops(self, context: int) -> float:
        """一个新 token 对 ``context`` 个已缓存的 token 做注意力的浮点次数；潜缓存按 absorb 形式算。"""
        return self._attention_flops(context, self.latent)

    def prefill_attention_flops(self, context: int) -> float:
        """同上，用 prefill 的形式；展开 K/V 的矩阵乘已经算在 kv_b 的参数里。"""
        return self._attention_flops(context, self.absorb_prefill)

    def _attention_flops(self, context: int, absorb: bool) -> float:
        c = self.config
        width = c.latent_cache_values + c.kv_lora_rank if absorb else c.qk_head_dim + c.v_head_dim
        seen, ranking = self.rows_read(context), 0.0
        if c.indexer is not None and seen < context:
            # 索引器给每个 key 打分，注意力只看选中的。
            ranking = 2.0 * self.index_layers * c.indexer.n_heads * context * (c.indexer.head_dim + 1)
        return ranking + 2.0 * self.cached_layers * c.num_attention_heads * seen * width


def part_of(name: str, shape: tuple[int, ...]) -> Part:
    """一个检查点张量算在哪一部分。"""
    if name == "model.embed_tokens.weight":
        return "embed"
    if name.startswith("lm_head."):  # 4 位的存成几个张量
        return "head"
    if len(shape) == 1 or name.endswith((".mlp.gate.weight", ".indexer.weights_proj.weight")):
        return "small"
    if ".mlp.experts." in name:
        return "experts"
    return "kv_b" if ".kv_b_proj." in name else "layers"
