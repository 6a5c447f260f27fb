"""absorb 形式的 MLA，跑在 transformers 自己的 latent cache 上。

transformers 的缓存里每层存两个张量：``keys`` 是过了 ``kv_a_layernorm`` 的 latent [B, 1, T, r]，``values`` 是旋转过的 k_pe
[B, 1, T, dr]；可是每一步都用 ``kv_b_proj`` 把整个缓存重新展开成逐头的 K、V。这里只换掉这一步：投影、旋转、缓存的内容与布局都不变，
所以替换前后的模块可以接着用同一个缓存。

替换的办法是改 ``module.__class__``：对象、参数、hook 都还是原来的那个，还原就是改回去。

这里不从任何形状推断“过去有多长”：静态缓存一次返回整个容量，滑动窗口的缓存丢掉前面的行，形状里没有答案。谁看得见谁只听遮罩的；
没有遮罩时照 transformers 自己的约定（:meth:`_AbsorbedAttention._visible_without_mask`）。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from deepseek_export.errors import DsxError
from deepseek_export.ops.mla_attention import attend_absorb, prefers_naive

AbsorbForm = Literal["absorb", "auto"]
#: 缓存参数的两个名字（新名、旧名）：transformers 的 forward 两个都认，谁直接调用这一层都不会丢掉缓存。
_CACHE_NAMES = ("cache", "past_key_values")
#: absorb 认得这两种实现的遮罩。
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
#: 这些参数改变分数本身，只有 transformers 的注意力函数认得。
_SCORE_OPTIONS = ("is_causal", "position_bias", "softcap")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _AbsorbedAttention:
    """放在 transformers 的注意力类之前的 mixin。

    不走 absorb 的时候原样调用 transformers 的 forward，逐位相同：

    1. ``auto`` 形式下展开更省（prefill、训练），见 :func:`~deepseek_export.ops.mla_attention.prefers_naive`；
    2. 要求返回注意力矩阵；
    3. 训练时开着 attention dropout；
    4. 给了 ``is_causal`` 之类改变分数的参数，或把模块的 ``is_causal`` 关了。

    走 absorb 之前先过 :func:`check_still_usable`：``apply`` 之后都可能变。
    """

    dsx_form: AbsorbForm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """参数与返回同 transformers；absorb 时没有注意力矩阵，第二项为 ``None``。

        Raises:
            DsxError: ``DSX-E804``，``apply`` 之后换了 attention 实现，或 ``kv_b_proj`` 不再只是一次矩阵乘。
        """
        this: Any = self
        cache, S = given_cache(kwargs), hidden_states.shape[1]
        if not self._absorbs(S, cached_rows(this, S, cache), kwargs):
            return super().forward(  # type: ignore[misc]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        check_still_usable(this, attention_mask)
        B = hidden_states.shape[0]
        q = this.q_proj(hidden_states) if this.q_lora_rank is None else this._low_rank_query(hidden_states)
        q_nope, q_pe, latent = project(this, q, hidden_states, cache, this._rotate, position_embeddings)
        past = 0
        if attention_mask is None:
            latent, past = self._visible_without_mask(latent, S)
        o = attend_absorb(
            q_nope,
            q_pe,
            latent,
            torch.full((B,), past, device=latent.device),
            this.kv_b_proj.weight,
            this.scaling,
            additive(attention_mask),
        )
        return this.o_proj(silence_blind_rows(o, attention_mask).reshape(B, S, -1)), None

    def _absorbs(self, S: int, T: int, kwargs: dict[str, Any]) -> bool:
        this: Any = self
        if keeps_transformers(this, kwargs):
            return False
        return self.dsx_form == "absorb" or not prefers_naive(
            S, T, this.qk_nope_head_dim, this.v_head_dim, this.kv_lora_rank
        )

    def _visible_without_mask(self, latent: Tensor, S: int) -> tuple[Tensor, int]:
        """transformers 没给遮罩时：要用的行 [B, 1, T', r+dr]，以及第 0 个 query 之前有几行看得见。

        1. sdpa、S > 1：只在缓存是空的时候才省掉遮罩，因果从第 0 行对齐；静态缓存 S 行之后都是空的，切掉。
        2. 其余：一行 query（看得见缓存返回的全部），或 eager 而调用者没给遮罩（transformers 也不遮）。
        """
        this: Any = self
        if S > 1 and this.config._attn_implementation == "sdpa":
            return latent[:, :, :S], 0
        return latent, latent.shape[2]

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


def given_cache(kwargs: dict[str, Any]) -> Any:
    """调用者给的缓存，新名旧名都认；没有就是 ``None``。"""
    return next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)


def cached_rows(this: Any, S: int, cache: Any) -> int:
    """缓存自己说 update 会返回几行；只用来比较代价，不用来决定谁看得见谁。"""
    return S if cache is None else cache.get_mask_sizes(S, this.layer_idx)[0]


def keeps_transformers(this: Any, kwargs: dict[str, Any]) -> bool:
    """这一次只有 transformers 自己的代码做得到：见 :class:`_AbsorbedAttention` 的 2 到 4。"""
    if kwargs.get("output_attentions", this.config.output_attentions):
        return True
    if this.training and this.attention_dropout:
        return True
    return not this.is_causal or any(kwargs.get(name) is not None for name in _SCORE_OPTIONS)


def project(
    this: Any,
    q: Tensor,
    hidden_states: Tensor,
    cache: Any,
    rotate: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]],
    position_embeddings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """分开 query 的两段、算出 latent、旋转、写缓存；``q`` 是 query 投影的输出 [B, S, H*(dn+dr)]。

    Returns:
        q_nope [B, S, H, dn]、q_pe [B, S, H, dr]、缓存返回的全部行 [B, 1, T, r+dr]。
    """
    B, S, _ = hidden_states.shape
    q_nope, q_pe = q.view(B, S, -1, this.qk_head_dim).split(
        [this.qk_nope_head_dim, this.qk_rope_head_dim], dim=-1
    )
    c_kv, k_pe = this.kv_a_proj_with_mqa(hidden_states).split(
        [this.kv_lora_rank, this.qk_rope_head_dim], dim=-1
    )
    c_kv = this.kv_a_layernorm(c_kv).unsqueeze(1)
    q_pe, k_pe = rotate(q_pe.transpose(1, 2), k_pe.unsqueeze(1), position_embeddings)
    if cache is not None:
        c_kv, k_pe = cache.update(c_kv, k_pe, this.layer_idx)
    return q_nope, q_pe.transpose(1, 2), torch.cat([c_kv, k_pe], dim=-1)


def check_still_usable(this: Any, attention_mask: Any) -> None:
    """走 absorb 之前再核对一次：``apply`` 之后模型可能又被改动。

    Raises:
        DsxError: ``DSX-E804``。
    """
    check_implementation(this.config)
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4):
        shape = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise DsxError(
            "DSX-E804",
            f"注意力遮罩是 {shape}，absorb 只认 eager 与 sdpa 的 [B, 1, S, T]",
            'model.set_attn_implementation("sdpa")，或 restore(model)',
        )
    if obstacle := projection_obstacle(this.kv_b_proj):
        what, todo = obstacle
        raise DsxError("DSX-E804", f"apply 之后，第 {this.layer_idx} 层的 kv_b_proj {what}", todo)


def check_implementation(config: Any) -> None:
    """attention 实现的遮罩 absorb 认得吗；模型随时可以换实现，所以用到时还要再问。

    Raises:
        DsxError: ``DSX-E804``，不认得。
    """
    if config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise DsxError(
            "DSX-E804",
            f"attention 实现是 {config._attn_implementation}，只认 {'、'.join(ATTENTION_IMPLEMENTATIONS)} 的遮罩",
            'model.set_attn_implementation("sdpa")，或 restore(model)',
        )


def projection_obstacle(linear: Any) -> tuple[str, str] | None:
    """absorb 直接用 ``kv_b_proj`` 的权重、绕过它的 forward，所以它必须真的只是一次矩阵乘。

    量化层、LoRA、参数化会换掉这一层或它的类；hook 与包装过的 forward 会改它的输出：效果都会悄悄丢掉。
    挂在所有模块上的全局 hook 不算，那是计数与剖析用的。

    Returns:
        它现在怎么了、怎么办；能用就是 ``None``。
    """
    if type(linear) is not nn.Linear:
        return (
            f"是 {type(linear).__name__}，不是普通的 nn.Linear",
            "先反量化，或合并 LoRA，再 apply；或 restore(model)",
        )
    if "forward" in linear.__dict__:
        return (
            "的 forward 被别的库包装过（例如 accelerate 的 offload）",
            "不用 device_map / offload 加载，或 restore(model)",
        )
    if any(linear.__dict__[name] for name in _HOOKS):
        return "上挂着 hook，absorb 不会调用它", "取下 hook，挂到 self_attn 上，或 restore(model)"
    if linear.bias is not None:
        return "有 bias，absorb 只用权重", "去掉 bias，或 restore(model)"
    # 编译时的权重是追踪器的替身；那之前的检查与编译出来的图仍然管着类与 hook。
    if not torch.compiler.is_compiling() and type(linear.weight) not in (nn.Parameter, Tensor):
        return (
            f"的权重是 {type(linear.weight).__name__}，不是普通的张量",
            "先反量化，再 apply；或 restore(model)",
        )
    return None


def additive(mask: Tensor | None) -> Tensor | None:
    """sdpa 的遮罩是 bool（True 可见），eager 的已经是加法的；看不见的用有限的最小值，整行看不见也不产生 NaN。"""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)


def silence_blind_rows(o: Tensor, mask: Tensor | None) -> Tensor:
    """什么都看不见的行（左填充），sdpa 的输出是零；照样给零，填充位置的 hidden 也就相同。

    Args:
        o: [B, S, H, dv]。
        mask: [B, 1, S, T]。
    """
    if mask is None or mask.dtype != torch.bool:
        return o
    return o.masked_fill(~mask.any(-1).transpose(1, 2).unsqueeze(-1), 0)
