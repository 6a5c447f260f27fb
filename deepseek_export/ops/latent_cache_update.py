"""``dsx::LatentCacheUpdate``：int8 的 latent 缓存的写入，由 ``tensorrt`` / ``tensorrt-rtx`` 的下沉产生，捕获的图里没有。

浮点的缓存由 TensorRT 自己的 KV_CACHE_UPDATE 写；它不收 int8，也不会量化，所以这一步是插件，写进去的字节与别的目标相同，末尾补零。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.mla_attention import update_cache


def latent_cache_update(c_kv: Tensor, k_pe: Tensor, kv_cache: Tensor, past_lens: Tensor) -> Tensor:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.LATENT_CACHE_UPDATE`。

    Returns:
        新的缓存，形状同 ``kv_cache``。
    """
    return update_cache(c_kv, k_pe, kv_cache, past_lens)


def fake(c_kv, k_pe, kv_cache, past_lens):
    """形状推导（meta）。"""
    return torch.empty_like(kv_cache)
