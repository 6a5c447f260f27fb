"""``dsx::SparseMlaAttention``：只看选中的那些行的 MLA；选哪些由 ``dsx::LightningIndexer`` 决定，也可以沿用前面某一层的。

与 ``dsx::MlaAttention`` 的差别只是 key 的集合，所以没有第二份注意力：一个 query 选中的行收集成一段缓存，它在那段缓存上
就是普通的 absorb 形式，``counts - 1`` 充当 ``past_lens``。T 不超过名额数时选中的就是全部看得见的行，走 ``MlaAttention`` 原来的路。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops import mla_attention as mla


def gather_rows(kv_cache: Tensor, indices: Tensor) -> Tensor:
    """每个 query 一段缓存：[B, 1, T, cw] 与 [B, S, K] → [B*S, 1, K, cw]；-1 处取第 0 行，由 ``counts`` 遮住。"""
    B, _, T, width = kv_cache.shape
    _, S, K = indices.shape
    start = torch.arange(B, device=indices.device)[:, None, None] * T
    flat = (indices.clamp(min=0).to(torch.int64) + start).reshape(-1)
    return kv_cache.reshape(B * T, width).index_select(0, flat).view(B * S, 1, K, width)


def attend_rows(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    w_kv_b: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """收集选中的行再做注意力；参数见 :data:`~deepseek_export.ops.table.SPARSE_MLA_ATTENTION`，``kv_cache`` 已写入新行。

    Returns:
        o: [B, S, H, dv]，dtype 同 ``q_nope``。
    """
    B, S, H, dn = q_nope.shape
    rows = gather_rows(kv_cache, indices)
    last = counts.reshape(B * S).to(torch.int64) - 1
    query, rotated = q_nope.reshape(B * S, 1, H, dn), q_pe.reshape(B * S, 1, H, -1)
    o = mla.attend_absorb(query, rotated, rows, last, w_kv_b, scale)
    return o.reshape(B, S, H, -1)


def chosen_keys(indices: Tensor, T: int) -> Tensor:
    """选中的位置写成遮罩：[B, S, K] → [B, S, T] bool，True 是选中；MLA 关闭时的基线用它。"""
    B, S, _ = indices.shape
    # 多出来的一列收下 -1。
    flags = torch.zeros(B, S, T + 1, device=indices.device)
    places = torch.where(indices < 0, T, indices).to(torch.int64)
    return flags.scatter(-1, places, 1.0)[..., :T] > 0


def sparse_mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    past_lens: Tensor,
    w_kv_b: Tensor,
    indices: Tensor,
    counts: Tensor,
    scale: float | Tensor,
    form: mla.MlaForm = "auto",
) -> tuple[Tensor, Tensor]:
    """算子的 eager 参考实现；``form`` 只决定不用收集的时候怎么算，见 :func:`~deepseek_export.ops.mla_attention.mla_attention`。

    Returns:
        o: [B, S, H, dv]；kv_cache_out: 形状同 ``kv_cache``。
    """
    if kv_cache.shape[2] <= indices.shape[2]:
        return mla.mla_attention(q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, scale, form)
    cache = mla.update_cache(c_kv, k_pe, kv_cache, past_lens)
    w_kv_b = mla.read_weight(w_kv_b, c_kv.shape[-1])
    return attend_rows(q_nope, q_pe, cache, w_kv_b, indices, counts, scale).contiguous(), cache


def fake(q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, indices, counts, scale):
    """形状推导（meta）。"""
    return mla.fake(q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, scale)
