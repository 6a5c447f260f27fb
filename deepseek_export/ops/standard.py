"""与单个标准 ONNX 算子一一对应的 torch 算子。

torch 自带的写法会被导出成别的东西：``scatter`` 变成 ``ScatterElements``（既不能原地执行，TensorRT 也不认），
``topk`` 在 CPU 上不保证并列时取小下标。这里各给一个语义与 ONNX 完全相同的 torch 算子，捕获时再译成那个 ONNX 算子。
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dsx_std", "DEF")
_LIBRARY.define("tensor_scatter(Tensor past_cache, Tensor update, Tensor write_indices) -> Tensor")
_LIBRARY.define("top_k(Tensor x, int k) -> (Tensor, Tensor)")


def tensor_scatter(past_cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """ONNX ``TensorScatter-24``（linear 模式，axis=-2）：把 ``update`` 写进缓存，返回新缓存。

    Args:
        past_cache: [B, X, T, d]。
        update: [B, X, S, d]，dtype 与缓存相同。
        write_indices: [B] int64，每个序列的起始行；要求 ``write_indices[b] + S <= T``。

    Returns:
        [B, X, T, d]。eager 下是新张量；在运行时里输入输出绑定同一块内存，原地完成。
    """
    return torch.ops.dsx_std.tensor_scatter(past_cache, update, write_indices)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ONNX ``TopK``：沿最后一维取最大的 k 个，降序，**并列取小下标**。

    Args:
        x: [..., n] 浮点。
        k: 1 <= k <= n。

    Returns:
        values [..., k] 与 indices [..., k] int64。
    """
    return torch.ops.dsx_std.top_k(x, k)


@torch.library.impl(_LIBRARY, "tensor_scatter", "CompositeExplicitAutograd")
def _tensor_scatter(past_cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    rows = write_indices[:, None] + torch.arange(update.shape[2], device=update.device)
    index = rows[:, None, :, None].expand(-1, update.shape[1], -1, update.shape[3])
    return past_cache.scatter(2, index, update)


@torch.library.register_fake("dsx_std::tensor_scatter", lib=_LIBRARY)
def _tensor_scatter_fake(past_cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(past_cache)


@torch.library.impl(_LIBRARY, "top_k", "CompositeExplicitAutograd")
def _top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # 稳定排序保证并列时下标小的在前；torch.topk 没有这个保证。
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


@torch.library.register_fake("dsx_std::top_k", lib=_LIBRARY)
def _top_k_fake(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
