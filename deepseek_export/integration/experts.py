"""稀疏专家，直接用 transformers 的叠放权重（``gate_up_proj`` [E, 2I, D]、``down_proj`` [E, D, I]）。

语义同 :func:`~deepseek_export.ops.moe_experts.moe_experts`。那里为了能被追踪，用 ``index_select`` 取出专家的权重，
每次调用都要拷一份；这里取视图，一个字节的权重也不拷。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3


class _SparseExperts:
    """放在 transformers 的专家类之前的 mixin。"""

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [N, D]、top_k_index [N, k]、top_k_weights [N, k] → [N, D]；N 可以为 0。

        按专家排序一次，每个有 token 的专家处理连续的一段；没有 token 的专家不碰。
        各专家的结果在 float32 里加权求和，次序固定，所以结果可复现。
        """
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
        return F.linear(F.silu(gate) * up, self.down_proj[expert])


class SparseV2Experts(_SparseExperts, v2.DeepseekV2Experts):
    """DeepSeek-V2 的专家。"""


class SparseV3Experts(_SparseExperts, v3.DeepseekV3Experts):
    """DeepSeek-V3 的专家。"""
