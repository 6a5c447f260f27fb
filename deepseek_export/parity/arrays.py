"""torch 张量与 numpy 数组互转；numpy 没有 bfloat16，用 ml_dtypes 的。"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """张量 → ndarray，尽量共用内存。"""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Tensor:
    """:func:`to_numpy` 的逆。"""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 → float32（无损），其余原样。"""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
