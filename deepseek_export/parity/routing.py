"""路由的近平局：分数几乎相等时换一个专家不是错误，要与真正的错误分开报告。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek_export.bundle import Manifest
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.parity.keys import router_dtype, selection_dtype
from deepseek_export.parity.selection import in_router_units, ranking
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.mla import Selection
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.reference.moe import MoE
from deepseek_export.reference.weights import torch_dtype


def router_margin(layer: DecoderLayer, residual: Tensor, config: ModelConfig) -> Tensor:
    """每个 token 的路由离“换一个专家”有多远。

    Args:
        layer: 参考模型的一层；dense 层返回 inf。
        residual: [B, S, D]，注意力之后的残差。
        config: 模型配置。

    Returns:
        [B, S] float32：第 k 名与第 k+1 名选择分数之差，与组的对应差，取小者。
    """
    if not isinstance(layer.mlp, MoE):
        return torch.full(residual.shape[:2], torch.inf)
    gate = layer.mlp.gate
    x = layer.post_attention_layernorm(residual).float()
    logits = torch.nn.functional.linear(x, gate.weight)
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    choice = scores + gate.e_score_correction_bias
    if config.group_score != "none":
        grouped = choice.unflatten(-1, (config.n_group, -1))
        best = grouped.topk(2, -1).values.sum(-1) if config.group_score == "top2_sum" else grouped.amax(-1)
        groups = _gap(best, config.topk_group)
        chosen = torch.zeros_like(best).scatter(-1, best.topk(config.topk_group, -1).indices, 1.0).bool()
        choice = grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)
        return torch.minimum(groups, _gap(choice, config.num_experts_per_tok))
    return _gap(choice, config.num_experts_per_tok)


@torch.no_grad()
def row_margin(manifest: Manifest, model: ReferenceModel, ids: Sequence[int]) -> np.ndarray:
    """参考模型里每个位置的路由离换一个专家、稀疏注意力离换一个 key 有多远，各层取最小，[len]。

    量化的 bundle 全是 inf：激活的 int8 舍入让路由在近平局处翻转，容差已经计入。
    """
    tokens, past = torch.tensor([list(ids)]), torch.zeros(1, dtype=torch.int64)
    margin = torch.full(tokens.shape, torch.inf)
    if manifest.quant is not None:
        return margin[0].numpy()
    router = router_dtype(manifest)
    band = selection_dtype(manifest, router)
    x, cos, sin = model.embed(tokens, past)
    caches = model.empty_caches(1, len(ids), torch_dtype(manifest.cache.dtype))
    selection: Selection = ()
    for layer, cache in zip(model.layers, caches, strict=True):
        assert isinstance(layer, DecoderLayer)
        ranked = ranking(layer, x, cos, sin, past, cache)
        if ranked is not None:
            margin = torch.minimum(margin, in_router_units(ranked.margin, band, router))
        residual, x, _, selection = layer.step(x, cos, sin, past, cache, selection)
        margin = torch.minimum(margin, router_margin(layer, residual, model.config))
    return margin[0].numpy()


def _gap(scores: Tensor, k: int) -> Tensor:
    """第 k 大与第 k+1 大之差；没有第 k+1 名时为 inf。"""
    if scores.shape[-1] == k:
        return torch.full(scores.shape[:-1], torch.inf)
    top = scores.topk(k + 1, -1).values
    return top[..., k - 1] - top[..., k]
