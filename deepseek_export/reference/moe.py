"""前馈层：SwiGLU MLP、router、专家与共享专家；参数名与 DeepSeek 检查点一致。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.moe_experts import experts_dense, moe_experts
from deepseek_export.ops.moe_gate import moe_gate

#: 算法：``sparse`` 只跑选中的专家；``dense`` 是 MoE 关闭（每个专家都跑）。
MoeForm = Literal["sparse", "dense"]


class MLP(nn.Module):
    """SwiGLU：``down(silu(gate(x)) * up(x))``。"""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.up_proj = nn.Linear(dim, inner, bias=False)
        self.down_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]。"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class StackedLinear(nn.Module):
    """E 个专家的同名权重叠成一个 [E, out, in]；只存参数，计算在 ``dsx::MoeExperts``。"""

    def __init__(self, num_experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, out_features, in_features))


class Experts(nn.Module):
    """全部路由专家的权重。"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = StackedLinear(E, inner, D)
        self.up_proj = StackedLinear(E, inner, D)
        self.down_proj = StackedLinear(E, D, inner)


class Gate(nn.Module):
    """router：权重与打分始终 float32。"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts))
        self.arguments = (
            config.scoring_func,
            config.n_group,
            config.topk_group,
            config.group_score,
            config.num_experts_per_tok,
            int(config.norm_topk_prob),
            config.routed_scaling_factor,
        )


class MoE(nn.Module):
    """MoE 层：router + 路由专家 + 共享专家（不经缩放直接相加）。

    Args:
        config: 模型配置。
        form: 见 :data:`MoeForm`。
        as_op: 见 :class:`~deepseek_export.reference.model.Forms`；``dense`` 没有算子。
    """

    def __init__(self, config: ModelConfig, form: MoeForm, as_op: bool = False) -> None:
        super().__init__()
        self.form, self.as_op = form, as_op and form == "sparse"
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(
                config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] → [B, S, D]。"""
        tokens = x.reshape(-1, x.shape[-1])
        logits = F.linear(tokens.float(), self.gate.weight)
        route = torch.ops.dsx.moe_gate if self.as_op else moe_gate
        topk_ids, topk_weights = route(logits, self.gate.e_score_correction_bias, *self.gate.arguments)
        if self.as_op:
            run: Callable[..., Tensor] = torch.ops.dsx.moe_experts
        else:
            run = moe_experts if self.form == "sparse" else experts_dense
        e = self.experts
        y = run(tokens, topk_ids, topk_weights, e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight)
        y = y.view(x.shape)
        return y if self.shared_experts is None else y + self.shared_experts(x)
