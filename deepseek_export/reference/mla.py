"""多头潜在注意力（MLA）模块；参数名与 DeepSeek 检查点一致。

出处：DeepSeek-V2（arXiv 2405.04434）§2.1；DeepSeek-V3 ``inference/model.py``。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.mla_attention import attend_expanded, mla_attention
from deepseek_export.ops.sparse_mla_attention import chosen_keys, sparse_mla_attention
from deepseek_export.ops.standard import tensor_scatter
from deepseek_export.reference.indexer import Indexer
from deepseek_export.reference.rope import apply_rope

#: 每个 query 选中的 key：``(indices [B, S, topk] int32, counts [B, S] int32)``；没有稀疏注意力的家族是空的。
Selection = tuple[Tensor, ...]

#: 算法：``expanded`` 是 MLA 关闭（每头 K/V 缓存）；其余见 :data:`~deepseek_export.ops.mla_attention.MlaForm`。
AttentionForm = Literal["expanded", "absorb", "naive", "auto"]

#: q_a_layernorm / kv_a_layernorm 用 RMSNorm 的默认 eps，**不是** ``config.rms_norm_eps``（transformers 与 DeepSeek 都如此）。
LATENT_NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """RMSNorm：float32 里归一化，转回原 dtype 再乘权重。导出为 ONNX ``RMSNormalization-23``。"""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → 同形同 dtype。"""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class MultiheadLatentAttention(nn.Module):
    """MLA 的一层。

    Args:
        config: 模型配置。
        form: 见 :data:`AttentionForm`。
        as_op: 见 :class:`~deepseek_export.reference.model.Forms`；``expanded`` 没有算子。
        runs_indexer: 自己挑 key；``False`` 而 ``config`` 有索引器的，沿用前面一层挑的。
        index_int8: 见 :class:`~deepseek_export.reference.model.Forms`。
    """

    def __init__(
        self,
        config: ModelConfig,
        form: AttentionForm,
        as_op: bool = False,
        runs_indexer: bool = False,
        index_int8: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.form, self.as_op = config, form, as_op
        D, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=bias)
        self.indexer = Indexer(config, as_op, index_int8) if runs_indexer else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_lens: Tensor,
        caches: tuple[Tensor, ...],
        selection: Selection = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], Selection]:
        """
        Args:
            x: [B, S, D]。
            cos, sin: [B, S, dr/2]。
            past_lens: [B] int64，本次之前每个序列已缓存的长度。
            caches: MLA 打开时是 ``(kv_cache [B,1,T,r+dr],)``；关闭时是 ``(k_cache [B,H,T,dn+dr], v_cache [B,H,T,dv])``；
                自己挑 key 的层后面还有一个 ``index_cache [B,1,T,iw]``。
            selection: 前面一层挑的 key；自己挑的不看它。

        Returns:
            输出 [B, S, D]，更新后的缓存（次序同输入），这一层用的 key。
        """
        c = self.config
        B, S, _ = x.shape
        H, dn, dr = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        latent = self.query_latent(x)
        q = self.q_b_proj(latent) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_pe = q.view(B, S, H, dn + dr).split([dn, dr], dim=-1)
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, dr], dim=-1)
        c_kv = self.kv_a_layernorm(c_kv)
        q_pe = apply_rope(q_pe, cos, sin, c.rope_layout)
        k_pe = apply_rope(k_pe.unsqueeze(2), cos, sin, c.rope_layout).squeeze(2)

        indexed: tuple[Tensor, ...] = ()
        if self.indexer is not None:
            caches, index_cache = caches[:-1], caches[-1]
            indices, counts, index_cache = self.indexer(x, latent, cos, sin, index_cache, past_lens)
            selection, indexed = (indices, counts), (index_cache,)
        if self.form == "expanded":
            o, caches = self._expanded(q_nope, q_pe, c_kv, k_pe, past_lens, caches, selection)
        else:
            latents = (q_nope, q_pe, c_kv, k_pe, caches[0], past_lens, self.kv_b_proj.weight)
            o, cache = self._latent(latents, selection)
            caches = (cache,)
        return self.o_proj(o.reshape(B, S, H * c.v_head_dim)), (*caches, *indexed), selection

    def query_latent(self, x: Tensor) -> Tensor:
        """q_b_proj 的输入：x [B, S, D] → [B, S, q_lora_rank]；没有 q_lora 的就是 ``x``。"""
        return self.q_a_layernorm(self.q_a_proj(x)) if self.config.q_lora_rank else x

    def _latent(self, latents: tuple[Tensor, ...], selection: Selection) -> tuple[Tensor, Tensor]:
        """MLA 打开：``latents`` 是算子的前七个输入。"""
        arguments = (*latents, *selection, self.config.softmax_scale)
        if self.as_op:
            run = torch.ops.dsx.sparse_mla_attention if selection else torch.ops.dsx.mla_attention
            o, cache = run(*arguments)
        else:
            eager: Callable[..., tuple[Tensor, Tensor]] = sparse_mla_attention if selection else mla_attention
            o, cache = eager(*arguments, form=self.form)
        return o, cache

    def _expanded(self, q_nope, q_pe, c_kv, k_pe, past_lens, caches, selection):
        """MLA 关闭：新 token 先展开成每头 K/V 再进缓存，与经典 Transformer 相同。"""
        c = self.config
        B, S, H, dn = q_nope.shape
        kv = self.kv_b_proj(c_kv).view(B, S, H, -1).transpose(1, 2)
        k = torch.cat([kv[..., :dn], k_pe.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1)
        k_cache = tensor_scatter(caches[0], k.to(caches[0].dtype), past_lens)
        v_cache = tensor_scatter(caches[1], kv[..., dn:].to(caches[1].dtype), past_lens)
        q = torch.cat([q_nope, q_pe], dim=-1)
        chosen = chosen_keys(selection[0], k_cache.shape[2]) if selection else None
        o = attend_expanded(q, k_cache, v_cache, past_lens, c.softmax_scale, chosen)
        return o, (k_cache, v_cache)
