"""absorb 形式的 MLA，跑在 transformers 自己的 latent cache 上。

transformers 的缓存里每层存两个张量：``keys`` 是过了 ``kv_a_layernorm`` 的 latent [B, 1, T, r]，``values`` 是旋转过的 k_pe
[B, 1, T, dr]；可是每一步都用 ``kv_b_proj`` 把整个缓存重新展开成逐头的 K、V。这里只换掉这一步：投影、旋转、缓存的内容与布局都不变，
所以替换前后的模块可以接着用同一个缓存。

替换的办法是改 ``module.__class__``：对象、参数、hook 都还是原来的那个，还原就是改回去。
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from deepseek_export.errors import DsxError
from deepseek_export.integration.compat import cache_name
from deepseek_export.ops.mla_attention import attend_absorb, prefers_naive

AbsorbForm = Literal["absorb", "auto"]


class _AbsorbedAttention:
    """放在 transformers 的注意力类之前的 mixin。

    不走 absorb 的时候原样调用 transformers 的 forward，逐位相同：

    1. ``auto`` 形式下展开更省（prefill、训练），见 :func:`~deepseek_export.ops.mla_attention.prefers_naive`；
    2. 要求返回注意力矩阵；
    3. 训练时开着 attention dropout。
    """

    dsx_form: AbsorbForm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """参数与返回同 transformers；absorb 时没有注意力矩阵，第二项为 ``None``。"""
        this: Any = self
        cache = kwargs.get(cache_name())
        S = hidden_states.shape[1]
        T = _visible_length(attention_mask, cache, this.layer_idx, S)
        if not self._absorbs(S, T, kwargs):
            return super().forward(  # type: ignore[misc]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        B = hidden_states.shape[0]
        q = this.q_proj(hidden_states) if this.q_lora_rank is None else this._low_rank_query(hidden_states)
        q_nope, q_pe = q.view(B, S, -1, this.qk_head_dim).split(
            [this.qk_nope_head_dim, this.qk_rope_head_dim], dim=-1
        )
        c_kv, k_pe = this.kv_a_proj_with_mqa(hidden_states).split(
            [this.kv_lora_rank, this.qk_rope_head_dim], dim=-1
        )
        c_kv = this.kv_a_layernorm(c_kv).unsqueeze(1)
        q_pe, k_pe = this._rotate(q_pe.transpose(1, 2), k_pe.unsqueeze(1), position_embeddings)
        if cache is not None:
            c_kv, k_pe = cache.update(c_kv, k_pe, this.layer_idx)
        latent = torch.cat([c_kv, k_pe], dim=-1)
        past_lens = torch.full((B,), latent.shape[2] - S, device=latent.device)
        o = attend_absorb(
            q_nope,
            q_pe.transpose(1, 2),
            latent,
            past_lens,
            this.kv_b_proj.weight,
            this.scaling,
            _additive(attention_mask),
        )
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            # 什么都看不见的行（左填充），sdpa 的输出是零；照样给零，填充位置的 hidden 也就相同。
            o = o.masked_fill(~attention_mask.any(-1).transpose(1, 2).unsqueeze(-1), 0)
        return this.o_proj(o.reshape(B, S, -1)), None

    def _absorbs(self, S: int, T: int, kwargs: dict[str, Any]) -> bool:
        this: Any = self
        if kwargs.get("output_attentions", this.config.output_attentions):
            return False
        if this.training and this.attention_dropout:
            return False
        return self.dsx_form == "absorb" or not prefers_naive(
            S, T, this.qk_nope_head_dim, this.v_head_dim, this.kv_lora_rank
        )

    def _low_rank_query(self, hidden_states: Tensor) -> Tensor:
        this: Any = self
        return this.q_b_proj(this.q_a_layernorm(this.q_a_proj(hidden_states)))


class AbsorbedV2Attention(_AbsorbedAttention, v2.DeepseekV2Attention):
    """DeepSeek-V2：``position_embeddings`` 是复数的 ``freqs_cis``。"""

    def _rotate(self, q_pe: Tensor, k_pe: Tensor, position_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return v2.apply_rotary_emb(q_pe, k_pe, position_embeddings.to(q_pe.device))


class AbsorbedV3Attention(_AbsorbedAttention, v3.DeepseekV3Attention):
    """DeepSeek-V3：``position_embeddings`` 是 ``(cos, sin)``。"""

    def _rotate(
        self, q_pe: Tensor, k_pe: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        interleave = self.config.rope_interleave
        rotate = v3.apply_rotary_pos_emb_interleave if interleave else v3.apply_rotary_pos_emb
        return rotate(q_pe, k_pe, *position_embeddings)


def _visible_length(mask: Tensor | None, cache: Any, layer: int, S: int) -> int:
    """这次注意力的键有多少行；静态缓存下是整个容量，以遮罩为准。

    Raises:
        DsxError: ``DSX-E804``，遮罩不是 4-D 张量：替换之后又换了 attention 实现。
    """
    if mask is None:
        return S if cache is None else int(cache.get_seq_length(layer)) + S
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise DsxError(
            "DSX-E804",
            f"注意力遮罩是 {shape}，absorb 只认 eager 与 sdpa 的 [B, 1, S, T]",
            'model.set_attn_implementation("sdpa")，或 restore(model)',
        )
    return mask.shape[-1]


def _additive(mask: Tensor | None) -> Tensor | None:
    """sdpa 的遮罩是 bool（True 可见），eager 的已经是加法的；看不见的用有限的最小值，整行看不见也不产生 NaN。"""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
