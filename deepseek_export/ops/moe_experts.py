"""``dsx::MoeExperts``：只运行被选中的专家（SwiGLU）。

一个专家的计算写在 :func:`expert_step` 里。eager 用 Python 循环调用它；捕获时同一个函数被追踪成 ONNX ``Loop`` 的循环体
（:mod:`deepseek_export.capture.bodies`），所以函数体与参考实现不会各写一份。:func:`experts_dense` 是 MoE 关闭时的基线。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def active_experts(x: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """循环的起点。

    Args:
        x: [N, D]。
        topk_ids: [N, k] int32。
        num_experts: E。

    Returns:
        累加器 y0 [N, D] float32 全零；至少有一个 token 的专家编号 [A] int64，升序。
    """
    experts = torch.arange(num_experts, dtype=topk_ids.dtype, device=topk_ids.device)
    hit = (topk_ids.reshape(-1, 1) == experts).any(0)
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device), torch.nonzero(hit).squeeze(-1)


def expert_step(
    y: Tensor,
    expert: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """让一个专家处理属于它的 token，加进累加器。

    Args:
        y: [N, D] float32 累加器。
        expert: [1] int64 专家编号。
        其余见 :data:`~deepseek_export.ops.table.MOE_EXPERTS`。

    Returns:
        新的累加器 [N, D] float32。
    """
    hit = topk_ids == expert.to(topk_ids.dtype)
    rows = torch.nonzero(hit.any(-1)).squeeze(-1)
    weight = torch.where(hit, topk_weights, torch.zeros_like(topk_weights)).sum(-1, keepdim=True)
    gate, up, down = (w.index_select(0, expert).squeeze(0) for w in (w_gate, w_up, w_down))
    x_rows = x.index_select(0, rows)
    out = F.linear(F.silu(F.linear(x_rows, gate)) * F.linear(x_rows, up), down)
    out = out.float() * weight.index_select(0, rows)
    # 一个专家内每个 token 至多出现一次，所以取出、相加、写回即可，不需要 TensorRT 拒绝的 reduction=add。
    return y.index_copy(0, rows, y.index_select(0, rows) + out)


def moe_experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.MOE_EXPERTS`。

    Returns:
        y [N, D]，dtype 同 ``x``。没有 token 的专家不运行；N 可以为 0。
    """
    y, experts = active_experts(x, topk_ids, w_gate.shape[0])
    for expert in experts.unsqueeze(-1):  # 不用 split：它对空张量也给出一块
        y = expert_step(y, expert, x, topk_ids, topk_weights, w_gate, w_up, w_down)
    return y.to(x.dtype)


def experts_dense(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """MoE 关闭时的基线：每个专家处理每个 token，再乘（多数为零的）路由权重。参数与返回同 :func:`moe_experts`。"""
    experts = torch.arange(w_gate.shape[0], dtype=topk_ids.dtype, device=x.device)
    hit = topk_ids.unsqueeze(-1) == experts  # [N, k, E]
    weights = torch.where(hit, topk_weights.unsqueeze(-1), 0.0).sum(1)  # [N, E]
    gate = torch.matmul(x, w_gate.transpose(1, 2))  # nd,eid->eni
    up = torch.matmul(x, w_up.transpose(1, 2))
    out = torch.matmul(F.silu(gate) * up, w_down.transpose(1, 2))  # [E, N, D]
    return (out.float() * weights.transpose(0, 1).unsqueeze(-1)).sum(0).to(x.dtype)


def fake(x, topk_ids, topk_weights, w_gate, w_up, w_down):
    """形状推导（meta）。"""
    return torch.empty_like(x)
