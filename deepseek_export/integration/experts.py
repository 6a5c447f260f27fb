"""稀疏专家，直接用 transformers 的叠放权重（``gate_up_proj`` [E, 2I, D]、``down_proj`` [E, D, I]）。

语义同 :func:`~deepseek_export.ops.moe_experts.moe_experts`。那里为了能被追踪，用 ``index_select`` 取出专家的权重，
每次调用都要拷一份；这里取视图，一个字节的权重也不拷。

按每个专家的 token 数切段要在主机上知道这些数，追踪不了。``torch.compile`` 与 ``torch.export`` 追踪时换成 transformers 自己的
``grouped_mm`` 实现：同样先按专家排序、只算有 token 的专家，不拷权重，段界是张量。
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from deepseek_export.errors import DsxError


class SparseExperts:
    """放在 transformers 的专家类之前的 mixin。"""

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [N, D]、top_k_index [N, k]、top_k_weights [N, k] → [N, D]；N 可以为 0。

        按专家排序一次，每个有 token 的专家处理连续的一段；没有 token 的专家不碰。
        各专家的结果在 float32 里加权求和，次序固定，所以结果可复现。

        Raises:
            DsxError: ``DSX-E804``，``apply`` 之后权重被量化，或专家被分到几个进程。
        """
        this: Any = self
        if obstacle := experts_obstacle(this):
            what, todo = obstacle
            raise DsxError("DSX-E804", f"apply 之后，专家{what}", f"{todo}；或 restore(model)")
        if torch.compiler.is_compiling():
            return grouped_mm_experts_forward(this, hidden_states, top_k_index, top_k_weights)
        k = top_k_index.shape[1]
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        x = hidden_states[order // k]
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        parts = [
            self._expert(expert, rows)
            for expert, rows in zip(range(self.num_experts), x.split(counts), strict=True)
            if len(rows)
        ]
        y = torch.cat(parts)[order.argsort()] if parts else x
        y = y.view(*top_k_index.shape, x.shape[1]).float() * top_k_weights.unsqueeze(-1)
        return y.sum(1).to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


class SparseV2Experts(SparseExperts, v2.DeepseekV2Experts):
    """DeepSeek-V2 的专家。"""


class SparseV3Experts(SparseExperts, v3.DeepseekV3Experts):
    """DeepSeek-V3 的专家。"""


def experts_obstacle(experts: Any) -> tuple[str, str] | None:
    """这里直接用叠放的权重；hook 与参数化照常（forward 由 ``Module.__call__`` 调用，权重每次现取）。

    Returns:
        专家现在怎么了、怎么办；能用就是 ``None``。
    """
    if getattr(experts, "_is_expert_parallel", False):  # 5.17 还没有这个属性
        return "分布在多个进程上", "不用 expert parallel 加载，或只打开 mla"
    for weight in (experts.gate_up_proj, experts.down_proj):
        if not weight.is_floating_point() or weight.itemsize < 2:
            return f"的权重是 {weight.dtype}", "先反量化成 bfloat16"
    return None
