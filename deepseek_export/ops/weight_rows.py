"""int8 的 ``w_kv_b``：一行的码与 scale 放在一起，所以算子的输入个数与浮点的相同。

一行（r 是 block 的倍数，block 是 32、64 或 128）::

    | r 个码，int8 | r/block 个 float16 的 scale，低字节在前，各两个 int8 |

值是码乘所在块的 scale，scale 不小于零。
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode_weight_rows(rows: Tensor, width: int) -> Tensor:
    """码与 scale → 权重。

    Args:
        rows: [N, r + 2*r/block] int8。
        width: r。

    Returns:
        [N, r] float32。
    """
    codes, scales = rows.split([width, rows.shape[1] - width], dim=1)
    factors = scales.contiguous().view(torch.float16).float()
    blocks = codes.float().unflatten(1, (factors.shape[1], -1))
    return (blocks * factors[:, :, None]).flatten(1)
