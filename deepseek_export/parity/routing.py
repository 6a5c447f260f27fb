"""路由的近平局：分数几乎相等时换一个专家不是错误，要与真正的错误分开报告。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepseek_export.bundle import Manifest
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.parity.keys import router_dtype, selection_dtype
from deepseek_export.parity.measures import measure
from deepseek_export.parity.selection import in_router_units, ranking
from deepseek_export.parity.tolerances import ROUTER_MARGIN
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.mla import Selection
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.reference.moe import MoE
from deepseek_export.reference.weights import torch_dtype

if TYPE_CHECKING:
    from deepseek_export.parity.blocks import Block, Output
    from deepseek_export.parity.report import Case


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


def without_flipped(case: Case, output: Output, got: np.ndarray, margin: np.ndarray) -> Case:
    """把路由近平局、且确实换了专家的行挑出来单独计数，其余行仍按容差要求。"""
    limit = output.tolerance.limit(measure(got, output.want).scale)
    error = np.abs(got.astype(np.float64) - output.want).max(-1)
    flipped = ~(error <= limit) & (margin < ROUTER_MARGIN[output.key[1]])
    if not flipped.any() or flipped.all():
        return case
    kept = replace(output, want=output.want[~flipped]).compare("block", case.name, got[~flipped])
    kept.near_ties = int(flipped.sum())
    return kept


def spread_near_ties(block: Block) -> tuple[Block, int]:
    """把路由近平局的行换成离平局最远的那一行，使结果不取决于谁的末位误差。

    前馈对每个 token 独立，输入又是直接喂的，换行不影响别的行。Polygraphy 只会逐元素比，不认得近平局。

    Returns:
        换过的块，与换掉的行数。
    """
    if block.margin is None:
        return block, 0
    (output,) = block.outputs
    ties = block.margin < ROUTER_MARGIN[output.key[1]]
    if not ties.any():
        return block, 0
    best = np.unravel_index(int(block.margin.argmax()), block.margin.shape)

    def spread(array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy[ties] = array[best]
        return copy

    feeds = {**block.feeds, block.residual: spread(block.feeds[block.residual])}
    outputs = (replace(output, want=spread(output.want)),)
    return replace(block, feeds=feeds, outputs=outputs, margin=spread(block.margin)), int(ties.sum())


def _gap(scores: Tensor, k: int) -> Tensor:
    """第 k 大与第 k+1 大之差；没有第 k+1 名时为 inf。"""
    if scores.shape[-1] == k:
        return torch.full(scores.shape[:-1], torch.inf)
    top = scores.topk(k + 1, -1).values
    return top[..., k - 1] - top[..., k]
