"""稀疏注意力（DSA）跑在 transformers 自己的缓存上：只读索引器选中的行。

transformers 把选择写成遮罩，仍对展开的整个缓存做稠密注意力。这里选的仍是它选的那些（同一个索引器，同样的公式、同样的 top-k），不同的只有
两处：

- 索引器：T 不超过名额时不打分，选中的就是全部；超过时一批 query 一批 query 地打分，[S, 头, T] 的分数不会整个出现；
- 注意力：选中的行收集成一段，在上面做 absorb 形式，遮罩也取选中的那几格。名额够全部时不收集。

看得见谁仍只听遮罩的：静态缓存的空行、左填充都由它遮住。整行什么都看不见的 query，eager 下 transformers 给出的是没有意义的平均，这里平均的是
另外一些行；它后面的 query 看不见它。
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from deepseek_export.integration.attention import (
    AbsorbForm,
    additive,
    cached_rows,
    check_still_usable,
    given_cache,
    keeps_transformers,
    project,
    silence_blind_rows,
)
from deepseek_export.integration.experts import SparseExperts
from deepseek_export.ops.mla_attention import attend_absorb
from deepseek_export.ops.sparse_mla_attention import gather_rows

#: 打分时一批 query 的分数、收集时一批 query 的行，各至多这么多个 float32（64 MiB）。
_BLOCK_VALUES = 1 << 24


class _GatheredAttention:
    """放在 transformers 的稀疏注意力类之前的 mixin；不收集的时候（见 :func:`_expands`）原样调用它的 forward。"""

    dsx_form: AbsorbForm
    #: transformers 的 forward 是不是还返回这一层用的位置，给沿用的层。
    returns_indices: bool

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """参数与返回同 transformers；没有注意力矩阵，第二项为 ``None``。

        Raises:
            DsxError: ``DSX-E804``，``apply`` 之后换了 attention 实现，或 ``kv_b_proj`` 不再只是一次矩阵乘。
        """
        this: Any = self
        cache, S = given_cache(kwargs), hidden_states.shape[1]
        T = cached_rows(this, S, cache)
        if keeps_transformers(this, kwargs) or (self.dsx_form == "auto" and _expands(this, S, T)):
            return super().forward(  # type: ignore[misc]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        check_still_usable(this, attention_mask)
        residual = this.q_a_layernorm(this.q_a_proj(hidden_states))
        q_nope, q_pe, latent = project(
            this, this.q_b_proj(residual), hidden_states, cache, _rotate_pairs, position_embeddings
        )
        if this.indexer is None:
            indices = kwargs["prev_topk_indices"]
        else:
            visible = attention_mask[:, 0]
            indices = this.indexer(hidden_states, residual, position_embeddings, visible, None, cache=cache)
        o = _attend(this, q_nope, q_pe, latent, attention_mask, indices)
        output = this.o_proj(silence_blind_rows(o, attention_mask).reshape(*hidden_states.shape[:2], -1))
        return (output, None, indices) if self.returns_indices else (output, None)


class _BlockedIndexer:
    """放在 transformers 的索引器类之前的 mixin：名额够就不打分，不够就分批打分。"""

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """参数与返回同 transformers：[B, S, min(topk, T)] int32；``attention_mask`` 是 [B, S, T]。"""
        this: Any = self
        B, S, _ = hidden_states.shape
        k = self._rotated(this.k_norm(this.wk(hidden_states)).unsqueeze(2), position_embeddings).squeeze(2)
        if (cache := given_cache(kwargs)) is not None:
            k = cache.update_indexer(k, this.layer_idx)
        T = k.shape[1]
        if this.index_topk >= T:
            return torch.arange(T, dtype=torch.int32, device=k.device).expand(B, S, T)
        q = self._rotated(this.wq_b(q_resid).view(B, S, this.n_heads, this.head_dim), position_embeddings)
        projected = this.weights_proj(hidden_states.to(this.weights_proj.weight.dtype)).float()
        weights = projected * this.n_heads**-0.5
        keys = k.transpose(-1, -2).float().unsqueeze(1)
        chosen = []
        for rows in _blocks(S, B * this.n_heads * T):
            scores = F.relu(torch.matmul(q[:, rows].float(), keys) * this.softmax_scale)
            ranked = torch.matmul(weights[:, rows].unsqueeze(-2), scores).squeeze(-2)
            mask = attention_mask[:, rows]
            ranked = ranked.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else ranked + mask
            chosen.append(ranked.topk(this.index_topk, dim=-1).indices.to(torch.int32))
        return torch.cat(chosen, dim=1)

    def _rotated(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """前 ``qk_rope_head_dim`` 个 lane 旋转，其余原样；x [B, S, H, di]。"""
        this: Any = self
        dr = this.qk_rope_head_dim
        rotated, plain = x.split([dr, x.shape[-1] - dr], dim=-1)
        cos, sin = position_embeddings
        rotated, _ = this.rotate(rotated, rotated, cos, sin, unsqueeze_dim=2)
        return torch.cat([rotated, plain], dim=-1)


class GatheredV32Attention(_GatheredAttention, v32.DeepseekV32Attention):
    """DeepSeek-V3.2：每层自己选。"""

    returns_indices = False


class GatheredGlmAttention(_GatheredAttention, glm.GlmMoeDsaAttention):
    """GLM-5：有的层沿用前面一层选的。"""

    returns_indices = True


class BlockedV32Indexer(_BlockedIndexer, v32.DeepseekV32Indexer):
    """DeepSeek-V3.2 的索引器：旋转分前后两半。"""

    rotate = staticmethod(v32.apply_rotary_pos_emb)


class BlockedGlmIndexer(_BlockedIndexer, glm.GlmMoeDsaIndexer):
    """GLM-5 的索引器：旋转成对。"""

    rotate = staticmethod(glm.apply_rotary_pos_emb_interleave)


class SparseV32Experts(SparseExperts, v32.DeepseekV32Experts):
    """DeepSeek-V3.2 的专家。"""


class SparseGlmExperts(SparseExperts, glm.GlmMoeDsaExperts):
    """GLM-5 的专家。"""


ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    v32.DeepseekV32Attention: GatheredV32Attention,
    glm.GlmMoeDsaAttention: GatheredGlmAttention,
}
INDEXERS: dict[type[nn.Module], type[nn.Module]] = {
    v32.DeepseekV32Indexer: BlockedV32Indexer,
    glm.GlmMoeDsaIndexer: BlockedGlmIndexer,
}
EXPERTS: dict[type[nn.Module], type[nn.Module]] = {
    v32.DeepseekV32Experts: SparseV32Experts,
    glm.GlmMoeDsaExperts: SparseGlmExperts,
}


def _rotate_pairs(q_pe: Tensor, k_pe: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
    return v32.apply_rotary_pos_emb_interleave(q_pe, k_pe, *position_embeddings)


def _expands(this: Any, S: int, T: int) -> bool:
    """展开整个缓存、稠密地算比收集省吗；每头的乘加次数，名额够时就是 ``prefers_naive``。"""
    K = min(this.config.index_topk, T)
    dn, dr, dv, r = this.qk_nope_head_dim, this.qk_rope_head_dim, this.v_head_dim, this.kv_lora_rank
    expand = r * (dn + dv)
    return T * expand + S * T * (dn + dr + dv) < S * (expand + K * (2 * r + dr))


def _attend(this: Any, q_nope: Tensor, q_pe: Tensor, latent: Tensor, mask: Tensor, indices: Tensor) -> Tensor:
    """选中的行上的 absorb；选中的就是全部时不收集。返回 [B, S, H, dv]。"""
    B, S, H, _ = q_nope.shape
    K, weight, scale = indices.shape[-1], this.kv_b_proj.weight, this.scaling
    bias = additive(mask)
    none = torch.zeros(1, dtype=torch.long, device=latent.device)  # 谁看得见由遮罩说
    if latent.shape[2] == K:
        return attend_absorb(q_nope, q_pe, latent, none, weight, scale, bias)
    assert bias is not None
    bias = bias.expand(B, 1, S, -1)[:, 0]
    parts = []
    for rows in _blocks(S, B * K * latent.shape[-1]):
        chosen = indices[:, rows]
        count = chosen.shape[1]
        o = attend_absorb(
            q_nope[:, rows].reshape(B * count, 1, H, -1),
            q_pe[:, rows].reshape(B * count, 1, H, -1),
            gather_rows(latent, chosen),
            none,
            weight,
            scale,
            bias[:, rows].gather(-1, chosen.long()).view(B * count, 1, 1, K),
        )
        parts.append(o.reshape(B, count, H, -1))
    return torch.cat(parts, dim=1)


def _blocks(S: int, values: int) -> list[slice]:
    """S 个 query 分批，``values`` 是一个 query 要占多少个数；追踪时不分批，图里没有循环。"""
    size = S if torch.compiler.is_compiling() else max(1, _BLOCK_VALUES // max(values, 1))
    return [slice(start, start + size) for start in range(0, S, size)]
