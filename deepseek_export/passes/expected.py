"""流水线的每一步应当处理几处：由配置或跑之前的图算出，不由 pass 自己报。"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from deepseek_export.ops.table import DOMAIN, MLA_ATTENTION, MOE_EXPERTS, SPARSE_MLA_ATTENTION
from deepseek_export.passes.base import GraphModule

#: 图 → 个数。
Count: TypeAlias = Callable[[GraphModule], int]


def nodes(*ops: str, domain: str = DOMAIN) -> Count:
    """这几种节点的个数；捕获之后每个 dsx 算子有几个已按方案核对过。"""
    return lambda module: sum(len(module.find(op, domain)) for op in ops)


def oversized_experts(module: GraphModule) -> int:
    """有权重太大的 ``MoeExperts``。"""
    large = set(module.oversized())
    return sum(any(t.name in large for t in node.inputs) for node in module.find(MOE_EXPERTS.name))


def paired_ropes(module: GraphModule) -> int:
    """要把成对的通道改成前后两半的 RoPE。"""
    return _main_ropes(module) + _index_ropes(module)


def biased_ropes(module: GraphModule) -> int:
    """其中重排排不进权重的：线性层带 bias 的每层的 k_pe；索引器的，它们旋转的是前一段。"""
    return (_main_ropes(module) // 2 if module.config.attention_bias else 0) + _index_ropes(module)


def absorbable_ropes(module: GraphModule) -> int:
    """其余的。"""
    return paired_ropes(module) - biased_ropes(module)


def _main_ropes(module: GraphModule) -> int:
    """每层的 q_pe 与 k_pe。"""
    return 2 * len(module.layers) if module.config.rope_layout == "deinterleaved" else 0


def _index_ropes(module: GraphModule) -> int:
    """每个索引器的 q 与 k。"""
    indexer = module.config.indexer
    paired = indexer is not None and indexer.rope_layout == "deinterleaved"
    return 2 * sum(map(module.config.runs_indexer, module.layers)) if paired else 0


def linear_layers(module: GraphModule) -> int:
    """每层的 q（一个或两个）、kv_a、o，MLA 关闭时还有 kv_b；索引器的 wq_b 与 wk；MLP 或共享专家的三个；lm_head，草稿模型的 eh_proj。"""
    config, layers = module.config, module.layers
    absorbing = (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name)
    latent = any(site.op in absorbing for site in module.sites)
    attention = 4 + (config.q_lora_rank is not None) - latent
    mlps = sum(bool(config.n_shared_experts) or not config.is_moe_layer(layer) for layer in layers)
    indexers = sum(map(config.runs_indexer, layers))
    return attention * len(layers) + 2 * indexers + 3 * mlps + 1 + (module.role == "draft")


def linears_and_experts(module: GraphModule) -> int:
    """线性层，与每层专家（MoE 打开时每个 ``MoeExperts``）叠放的三个权重。"""
    experts = len(module.find(MOE_EXPERTS.name)) or sum(map(module.config.is_moe_layer, module.layers))
    return linear_layers(module) + 3 * experts
