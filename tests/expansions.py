"""数 ``kv_b_proj`` 展开了几行：看的是矩阵乘本身，不挂 hook（挂了 hook 的 ``kv_b_proj``，absorb 会拒绝）。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class KvExpansions(TorchFunctionMode):
    """上下文里每次用 ``kv_b_proj`` 的权重做 ``F.linear``，输入有几行就记一个数。

    Args:
        model: transformers 模型。

    Attributes:
        rows: 依次的行数。
    """

    def __init__(self, model) -> None:
        super().__init__()
        self._weights = [layer.self_attn.kv_b_proj.weight for layer in model.model.layers]
        self.rows: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None) -> torch.Tensor:
        if func is F.linear and any(args[1] is weight for weight in self._weights):
            self.rows.append(args[0].shape[-2])
        return func(*args, **(kwargs or {}))
