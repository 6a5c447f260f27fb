"""``dsx::SpecAccept`` / ``dsx::SpecAcceptRejection``：在图里决定接受几个草稿 token，主机只读 token。

出处：Leviathan 等（arXiv 2211.17192）算法 1；DeepSeek-V3（arXiv 2412.19437）§5.4.3。

两个算子都允许 K = 0（没有草稿）：此时就是一步普通解码。
"""

from __future__ import annotations

import torch
from torch import Tensor


def spec_accept(draft_ids: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """greedy 验证。

    Args:
        draft_ids: [B, K] int64。
        target_logits: [B, K+1, V]，主模型在这 K+1 个位置的 logits。

    Returns:
        num_accepted [B] int64：与主模型 argmax 相同的最长前缀；next_id [B] int64：其后主模型自己的 token。
    """
    best = target_logits.float().argmax(-1)
    accepted = _prefix_length(draft_ids == best[:, :-1])
    return accepted, best.gather(1, accepted.unsqueeze(-1)).squeeze(-1)


def spec_accept_rejection(
    draft_ids: Tensor, target_logits: Tensor, draft_probs: Tensor, uniform: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """拒绝采样：输出分布与直接从主模型采样完全相同。

    Args:
        draft_ids: [B, K] int64，从 ``draft_probs`` 采样得到。
        target_logits: [B, K+1, V]。
        draft_probs: [B, K, V] float32，草稿模型在同一温度下的分布 q。
        uniform: [B, K+1] float32，[0, 1) 的均匀随机数；前 K 个决定接受与否，最后一个用来采 ``next_id``。
        temperature: [1] float32，大于 0。

    Returns:
        num_accepted [B] int64、next_id [B] int64。
    """
    p = (target_logits.float() / temperature).softmax(-1)
    chosen = draft_ids.unsqueeze(-1)
    p_draft = p[:, :-1].gather(2, chosen).squeeze(-1)
    q_draft = draft_probs.gather(2, chosen).squeeze(-1)
    accepted = _prefix_length(uniform[:, :-1] * q_draft < p_draft)
    row = accepted.view(-1, 1, 1).expand(-1, 1, p.shape[-1])
    # 全部接受时没有 q 可减：在 q 末尾补一行零，残差就是 p 本身。
    q = torch.cat([draft_probs, torch.zeros_like(p[:, :1])], dim=1)
    target, draft = p.gather(1, row).squeeze(1), q.gather(1, row).squeeze(1)
    residual = (target - draft).clamp_min(0.0)
    # p 与 q 逐项相等到舍入误差时残差可能全零；此时两者同分布，用 p。
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
    cdf = weights.cumsum(-1)
    threshold = uniform[:, -1:] * cdf[:, -1:]
    # 第一个累积值超过阈值的 token；权重为零的 token 累积值不增，不会被选中。
    next_id = (cdf <= threshold).sum(-1)
    return accepted, next_id.clamp_max(p.shape[-1] - 1)


def _prefix_length(matches: Tensor) -> Tensor:
    """[B, K] bool → [B] int64：开头连续 True 的个数。"""
    return (matches.logical_not().to(torch.int64).cumsum(-1) == 0).to(torch.int64).sum(-1)


def fake(draft_ids, *_):
    """形状推导（meta）。"""
    return draft_ids.new_empty(draft_ids.shape[:1]), draft_ids.new_empty(draft_ids.shape[:1])
