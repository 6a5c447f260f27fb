"""``dsx::MlaAttention``：latent KV cache 上的多头潜在注意力，两种数学上相等的算法并列。

出处：DeepSeek-V2（arXiv 2405.04434）§2.1；DeepSeek-V3 ``inference/model.py`` 的 ``naive`` 与 ``absorb``。

``w_kv_b`` 按头分成 ``W_UK [H, dn, r]`` 与 ``W_UV [H, dv, r]``，于是 ``k_nope = W_UK c``、``v = W_UV c``：

- ``naive``：先把整个缓存展开成每头的 K、V 再做普通注意力。展开一次要 ``T*H*r*(dn+dv)`` 次乘加。
- ``absorb``：``q_nope·(W_UK c) = (q_nope W_UK)·c``，把 W_UK 吸收进 query、W_UV 吸收进输出，缓存里的 latent 直接当
  K 和 V 用，每步只多 ``S*H*r*(dn+dv)`` 次乘加，但每个（query, key）对要 ``2r+dr`` 而不是 ``dn+dr+dv`` 次。
- ``auto``：按上面两个代价当场比较。解码（S 小）走 absorb，长 prefill 走 naive。
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deepseek_export.ops.int8_cache import decode_rows, encode_rows, padded_rows
from deepseek_export.ops.standard import tensor_scatter
from deepseek_export.ops.weight_rows import decode_weight_rows

MlaForm = Literal["absorb", "naive", "auto"]


def update_cache(c_kv: Tensor, k_pe: Tensor, kv_cache: Tensor, past_lens: Tensor) -> Tensor:
    """把新 token 的 latent 写进缓存。

    Args:
        c_kv: [B, S, r]，已过 ``kv_a_layernorm``。
        k_pe: [B, S, dr]，已旋转。
        kv_cache: [B, 1, T, r+dr]，dtype 可与 ``c_kv`` 不同（``mla.cache_dtype``）；int8 的一行见
            :mod:`~deepseek_export.ops.int8_cache`，末尾可以补过零。
        past_lens: [B] int64。

    Returns:
        形状同 ``kv_cache``，第 ``past_lens[b] .. past_lens[b]+S-1`` 行是新值。
    """
    if kv_cache.dtype == torch.int8:
        new = padded_rows(encode_rows(c_kv, k_pe), kv_cache.shape[-1])
    else:
        new = torch.cat([c_kv, k_pe], dim=-1).to(kv_cache.dtype)
    return tensor_scatter(kv_cache, new.unsqueeze(1), past_lens)


def read_cache(kv_cache: Tensor, kv_lora_rank: int, dr: int, dtype: torch.dtype) -> Tensor:
    """缓存里的值：[B, T, r+dr]，转成 ``dtype``。"""
    rows = kv_cache.squeeze(1)
    return (decode_rows(rows, kv_lora_rank, dr) if rows.dtype == torch.int8 else rows).to(dtype)


def read_weight(w_kv_b: Tensor, kv_lora_rank: int) -> Tensor:
    """w_kv_b 的值 [H*(dn+dv), r]；int8 的一行见 :mod:`~deepseek_export.ops.weight_rows`。"""
    return decode_weight_rows(w_kv_b, kv_lora_rank) if w_kv_b.dtype == torch.int8 else w_kv_b


def hidden_keys(past_lens: Tensor, S: int, T: int) -> Tensor:
    """因果遮罩：[B, 1, S, T] bool，True 表示看不见（``j > past_lens[b] + i``）。"""
    last = past_lens[:, None] + torch.arange(S, device=past_lens.device)
    return (torch.arange(T, device=past_lens.device) > last[:, :, None]).unsqueeze(1)


def attend_absorb(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    past_lens: Tensor,
    w_kv_b: Tensor,
    scale: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """absorb 形式的注意力核；参数见 :data:`~deepseek_export.ops.table.MLA_ATTENTION`，``kv_cache`` 已写入新行。

    Args:
        mask: 可广播到 [B, H, S, T]，加到缩放后的分数上，代替由 ``past_lens`` 得出的因果遮罩；左填充的 batch 要用它。

    Returns:
        o: [B, S, H, dv]，dtype 同 ``q_nope``。
    """
    H, dn, r = q_nope.shape[2], q_nope.shape[3], w_kv_b.shape[1]
    w = w_kv_b.view(H, -1, r)
    w_uk, w_uv = w[:, :dn], w[:, dn:]
    q_latent = torch.matmul(q_nope.transpose(1, 2), w_uk)  # bhsd,hdc->bhsc
    q = torch.cat([q_latent, q_pe.transpose(1, 2)], dim=-1)
    context = attend_latent(q, kv_cache, past_lens, scale, r, mask)
    return torch.matmul(context, w_uv.transpose(1, 2)).transpose(1, 2)  # bhsc,hdc->bshd


def attend_latent(
    q: Tensor,
    kv_cache: Tensor,
    past_lens: Tensor,
    scale: float | Tensor,
    kv_lora_rank: int,
    mask: Tensor | None = None,
) -> Tensor:
    """absorb 形式的内核：缓存里的 latent 直接当 K 和 V，所有头共用一份。

    Args:
        q: [B, H, S, r+dr]，已吸收 W_UK。
        kv_cache: [B, 1, T, r+dr]（int8 见 :func:`update_cache`），已写入新行。
        past_lens: [B] int64。
        scale: softmax 缩放，已含 YaRN 的 mscale 平方。
        kv_lora_rank: r。
        mask: 同 :func:`attend_absorb`。

    Returns:
        [B, H, S, r]，dtype 同 ``q``。
    """
    B, H, S, _ = q.shape
    T = kv_cache.shape[2]
    # QK、softmax、PV 是 float32 孤岛：fp16 下 576 项点积会溢出或丢精度。
    latent = read_cache(kv_cache, kv_lora_rank, q.shape[-1] - kv_lora_rank, torch.float32)
    query = q.float() * scale
    # 把 H 并进行维，一次 GEMM 只读一遍缓存，而不是每个头读一遍。
    scores = torch.matmul(query.reshape(B, H * S, -1), latent.transpose(1, 2)).view(B, H, S, T)
    if mask is None:
        scores = scores.masked_fill(hidden_keys(past_lens, S, T), float("-inf"))
    else:
        scores = scores + mask
    p = scores.softmax(-1)
    # PV 连 k_pe 那 dr 列一起乘、再切掉：比先从缓存切出前 r 列（每步一次整缓存拷贝）便宜。
    context = torch.matmul(p.view(B, H * S, T), latent)[..., :kv_lora_rank]
    return context.view(B, H, S, kv_lora_rank).to(q.dtype)


def attend_naive(
    q_nope: Tensor, q_pe: Tensor, kv_cache: Tensor, past_lens: Tensor, w_kv_b: Tensor, scale: float | Tensor
) -> Tensor:
    """naive 形式：展开整个缓存再做普通注意力。参数与返回同 :func:`attend_absorb`。"""
    B, _S, H, dn = q_nope.shape
    r, T = w_kv_b.shape[1], kv_cache.shape[2]
    dr = q_pe.shape[-1]
    c_kv, k_pe = read_cache(kv_cache, r, dr, q_nope.dtype).split([r, dr], dim=-1)
    kv = torch.matmul(c_kv, w_kv_b.transpose(0, 1)).view(B, T, H, -1).transpose(1, 2)
    k = torch.cat([kv[..., :dn], k_pe.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
    return attend_expanded(torch.cat([q_nope, q_pe], dim=-1), k, kv[..., dn:], past_lens, scale)


def attend_expanded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_lens: Tensor,
    scale: float | Tensor,
    chosen: Tensor | None = None,
) -> Tensor:
    """普通多头注意力（naive 形式与 MLA 关闭时的基线共用）。

    Args:
        q: [B, S, H, dn+dr]。
        k: [B, H, T, dn+dr]。
        v: [B, H, T, dv]。
        past_lens: [B] int64。
        scale: softmax 缩放，已含 YaRN 的 mscale 平方。
        chosen: [B, S, T] bool，稀疏注意力选中的 key，都看得见；``None`` 是全部看得见的。

    Returns:
        [B, S, H, dv]，dtype 同 ``q``；QK、softmax、PV 用 float32。
    """
    scores = torch.matmul(q.transpose(1, 2).float() * scale, k.float().transpose(2, 3))
    hidden = hidden_keys(past_lens, q.shape[1], k.shape[2]) if chosen is None else ~chosen.unsqueeze(1)
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.matmul(p, v.float()).to(q.dtype).transpose(1, 2)


def cost_coefficients(dn: int, dv: int, r: int) -> tuple[int, int]:
    """``auto`` 的代价系数 (a, b)：当 ``T*a < S*(a + T*b)`` 时 naive 更省（单位：每头乘加次数）。

    naive = ``T*a + S*T*(dn+dr+dv)``，absorb = ``S*a + S*T*(2r+dr)``，其中 ``a = r*(dn+dv)``；
    相减得 ``b = 2r-dn-dv``。每头都一样，所以与 H 无关。
    """
    return r * (dn + dv), 2 * r - dn - dv


def prefers_naive(S: int, T: int, dn: int, dv: int, r: int) -> bool:
    """``auto`` 对形状 (S, T) 选 naive 吗。"""
    a, b = cost_coefficients(dn, dv, r)
    return T * a < S * (a + T * b)


def mla_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    past_lens: Tensor,
    w_kv_b: Tensor,
    scale: float | Tensor,
    form: MlaForm = "auto",
) -> tuple[Tensor, Tensor]:
    """算子的 eager 参考实现；形状见 :data:`~deepseek_export.ops.table.MLA_ATTENTION`。

    ``form`` 不是算子属性：两种形式语义相同，选哪种是函数体的事。

    Returns:
        o: [B, S, H, dv]；kv_cache_out: 形状同 ``kv_cache``。
    """
    cache = update_cache(c_kv, k_pe, kv_cache, past_lens)
    w_kv_b = read_weight(w_kv_b, c_kv.shape[-1])
    _B, S, H, dn = q_nope.shape
    if form == "auto":
        dv = w_kv_b.shape[0] // H - dn
        form = "naive" if prefers_naive(S, cache.shape[2], dn, dv, w_kv_b.shape[1]) else "absorb"
    attend = attend_absorb if form == "absorb" else attend_naive
    # 与 fake 声明的步长一致；两种形式的结果都是转置过的视图。
    return attend(q_nope, q_pe, cache, past_lens, w_kv_b, scale).contiguous(), cache


def fake(q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, scale):
    """形状推导（meta）：o [B, S, H, dv] 与缓存同形。"""
    B, S, H, dn = q_nope.shape
    return q_nope.new_empty(B, S, H, w_kv_b.shape[0] // H - dn), torch.empty_like(kv_cache)
