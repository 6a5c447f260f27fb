"""``dsx::LightningIndexer``：DeepSeek 稀疏注意力（DSA）的索引器，给每个 query 挑出分数最高的 ``topk`` 个 key 的位置。

出处：DeepSeek-V3.2 技术报告；transformers ``models/deepseek_v32``。分数是 ``Σ_h w_h · relu(q_h · k)``，每个 token 只有一个 key 头。

与厂商推理代码不同的地方，都与 transformers 相同：不做 Hadamard 变换（它是正交的，只在随后要量化时才有意义），也不量化；缓存是 int8 时另一回事，
见 :mod:`~deepseek_export.ops.int8_index`。两个正的常数
（``head_dim**-0.5``、``n_heads**-0.5``）不影响名次，这里不乘。

看得见的 key 不超过 ``topk`` 个的 query 不必排名：全部选中，结果只由位置决定。所以 T 不超过 ``topk`` 时一个分数也不算，``q``、``w`` 也可以
没有行：新 token 有几个看 ``k``。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_export.ops.int8_index import encode_keys, encode_query, split_keys
from deepseek_export.ops.standard import tensor_scatter, top_k

#: 排序时排在所有位置后面；也是没有选中的意思，输出里换成 -1。
_NOWHERE = 1 << 30


def update_index_cache(k: Tensor, index_cache: Tensor, past_lens: Tensor) -> Tensor:
    """把新 token 的索引 key 写进缓存。

    Args:
        k: [B, S, di]，已过 k_norm、已旋转。
        index_cache: [B, 1, T, iw]，dtype 可与 ``k`` 不同；int8 的一行见 :mod:`~deepseek_export.ops.int8_index`。
        past_lens: [B] int64。

    Returns:
        形状同 ``index_cache``，第 ``past_lens[b] .. past_lens[b]+S-1`` 行是新值。
    """
    new = encode_keys(k) if index_cache.dtype == torch.int8 else k.to(index_cache.dtype)
    return tensor_scatter(index_cache, new.unsqueeze(1), past_lens)


def index_scores(q: Tensor, w: Tensor, index_cache: Tensor) -> Tensor:
    """每个 query 对缓存里每个位置的分数，不遮罩。

    Args:
        q: [B, S, Hi, di]，已旋转。
        w: [B, S, Hi] float32，每个头的权重，可以是负的。
        index_cache: [B, 1, T, iw]，已写入新行；int8 的，query 也舍入到 int8。

    Returns:
        [B, S, T] float32。
    """
    B, S, H, di = q.shape
    rows = index_cache.squeeze(1)
    if rows.dtype != torch.int8:
        return _weighted(q, w, rows)
    codes, scale = encode_query(q.reshape(B, S * H, di))
    keys, key_scale = split_keys(rows)
    weighted = _weighted(codes.view(B, S, H, di), w * scale.view(B, S, H), keys)
    return weighted * key_scale.transpose(1, 2)


def _weighted(q: Tensor, w: Tensor, keys: Tensor) -> Tensor:
    """``Σ_h w_h · relu(q_h · k)``：q [B, S, Hi, di]、keys [B, T, di] → [B, S, T] float32。"""
    B, S, H, di = q.shape
    keys = keys.float().transpose(1, 2)
    scores = torch.matmul(q.float().reshape(B, S * H, di), keys).relu().view(B, S, H, -1)
    return torch.matmul(w.unsqueeze(2), scores).squeeze(2)


def rank_keys(q: Tensor, w: Tensor, index_cache: Tensor, past_lens: Tensor, topk: int) -> Tensor:
    """按分数选，要求 T 不小于 ``topk``；参数与返回同 :func:`lightning_indexer`，``index_cache`` 已写入新行。"""
    last = last_visible(past_lens, q)
    return choose(visible_scores(q, w, index_cache, last), last, topk)


def last_visible(past_lens: Tensor, q: Tensor) -> Tensor:
    """每个 query 最后一个看得见的位置，[B, S]。"""
    return past_lens[:, None] + torch.arange(q.shape[1], device=q.device)


def visible_scores(q: Tensor, w: Tensor, index_cache: Tensor, last: Tensor) -> Tensor:
    """同 :func:`index_scores`，``last`` 之后的是 -inf。"""
    hidden = torch.arange(index_cache.shape[2], device=q.device) > last[:, :, None]
    return index_scores(q, w, index_cache).masked_fill(hidden, float("-inf"))


def choose(scores: Tensor, last: Tensor, topk: int) -> Tensor:
    """分数最大的 ``topk`` 个里看得见的，升序，其余 -1。

    Args:
        scores: [B, S, N]，``N`` 不小于 ``topk``，看不见的是 -inf。
        last: [B, S]，见 :func:`last_visible`。
        topk: 选几个。

    Returns:
        [B, S, topk] int32。
    """
    _, chosen = top_k(scores, topk)
    # 看得见的不够 topk 个时，剩下的名额落在看不见的位置上。
    chosen = torch.where(chosen > last[:, :, None], _NOWHERE, chosen)
    ascending = -top_k(-chosen, topk)[0]
    return torch.where(ascending == _NOWHERE, -1, ascending).to(torch.int32)


def every_key(past_lens: Tensor, S: int, topk: int) -> Tensor:
    """不排名：选中看得见的前 ``topk`` 个位置；T 不超过 ``topk`` 时就是全部看得见的。

    Returns:
        [B, S, topk] int32。
    """
    last = past_lens[:, None] + torch.arange(S, device=past_lens.device)
    places = torch.arange(topk, device=past_lens.device)
    return torch.where(places > last[:, :, None], -1, places).to(torch.int32)


def key_counts(past_lens: Tensor, S: int, topk: int) -> Tensor:
    """每个 query 选中几个：看得见的个数，不超过 ``topk``。返回 [B, S] int32。"""
    visible = past_lens[:, None] + torch.arange(1, S + 1, device=past_lens.device)
    return visible.clamp(max=topk).to(torch.int32)


def lightning_indexer(
    q: Tensor, w: Tensor, k: Tensor, index_cache: Tensor, past_lens: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.LIGHTNING_INDEXER`。

    Returns:
        indices [B, S, topk] int32：前 ``counts[b, s]`` 个是选中的位置，升序，其余是 -1；并列时取小的位置。
        counts [B, S] int32；index_cache_out：形状同 ``index_cache``。
    """
    cache, S = update_index_cache(k, index_cache, past_lens), k.shape[1]
    if cache.shape[2] <= topk:
        indices = every_key(past_lens, S, topk)
    else:
        indices = rank_keys(q, w, cache, past_lens, topk)
    return indices, key_counts(past_lens, S, topk), cache


def fake(q, w, k, index_cache, past_lens, topk):
    """形状推导（meta）。"""
    B, S = k.shape[:2]
    indices = q.new_empty(B, S, topk, dtype=torch.int32)
    return indices, q.new_empty(B, S, dtype=torch.int32), torch.empty_like(index_cache)
