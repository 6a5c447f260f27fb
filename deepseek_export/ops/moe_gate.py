"""``dsx::MoeGate``：DeepSeek 路由，覆盖 V2（softmax，greedy / group_limited_greedy）与 V3（sigmoid，noaux_tc）。

出处：DeepSeek-V2（arXiv 2405.04434）§2.2；DeepSeek-V3（arXiv 2412.19437）§2.1.2。

容易写错的几处：

- 选专家用带 bias 的分数，取权重用**不带** bias 的分数（noaux_tc）；
- 组外专家：V3 置 ``-inf``（带 bias 的分数可能为负，置 0 会选错），V2 置 ``0.0``；
- V2 不归一化权重；V3 归一化时分母不小于 1e-20（原版写作加 1e-20，float32 下两者只在和接近 1e-20 时有别）；
- sigmoid 写成 ``1/(1+exp(-x))``：ONNX Runtime 的 ``Sigmoid`` 是近似（绝对误差 5e-8，-18 以下直接为 0），
  对很小的分数相对误差太大；
- 全程 float32，并列取小下标。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.standard import top_k as stable_top_k


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    top_k: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.MOE_GATE`。

    Args:
        logits: [N, E] float32，router 的原始输出。
        bias: [E] float32，``e_score_correction_bias``；V2 没有，传零。
        scoring_func: ``softmax`` 或 ``sigmoid``。
        n_group, topk_group: 专家分组数、每个 token 可用的组数。
        group_score: ``none``（不分组）、``max``（V2）、``top2_sum``（V3）。
        top_k: 每个 token 的专家数。
        norm_topk_prob: 非零则把选中的权重归一化。
        routed_scaling_factor: 最后乘上的常数。

    Returns:
        topk_ids [N, k] int32（按选择分数降序），topk_weights [N, k] float32。
    """
    E = logits.shape[-1]
    scores = logits.softmax(-1) if scoring_func == "softmax" else precise_sigmoid(logits)
    choice = scores + bias
    if group_score != "none":
        grouped = choice.view(-1, n_group, E // n_group)
        group_scores = grouped.amax(-1) if group_score == "max" else stable_top_k(grouped, 2)[0].sum(-1)
        groups = stable_top_k(group_scores, topk_group)[1]
        chosen = (groups.unsqueeze(-1) == torch.arange(n_group, device=logits.device)).any(1)
        outside = 0.0 if group_score == "max" else float("-inf")
        choice = grouped.masked_fill(~chosen.unsqueeze(-1), outside).view(-1, E)
    ids = stable_top_k(choice, top_k)[1]
    # V2 从遮罩后的分数里取权重，V3 从不带 bias 的原分数里取。
    weights = (choice if group_score == "max" else scores).gather(1, ids)
    if norm_topk_prob:
        # 写成 clamp 而不是 +1e-20：exporter 会把“加一个极小数”当作加零删掉，全零时就成了 0/0。
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return ids.to(torch.int32), weights * routed_scaling_factor


def precise_sigmoid(x: Tensor) -> Tensor:
    """相对误差不随 x 变负而变大的 sigmoid；见模块说明。"""
    return torch.exp(-x).add(1.0).reciprocal()


def fake(
    logits, bias, scoring_func, n_group, topk_group, group_score, top_k, norm_topk_prob, routed_scaling_factor
):
    """形状推导（meta）。"""
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)
