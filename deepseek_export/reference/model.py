"""参考模型：嵌入、解码层、输出头，各是一个可以单独捕获的块。

块之间只传张量，块边界就是 ``dsx verify --level block`` 的比较点：

- :class:`Embed`：``input_ids, past_lens`` → ``x, cos, sin``；
- :class:`DecoderLayer`：``x, cos, sin, past_lens, 缓存...`` → ``注意力后的残差, 层输出, 新缓存...``；稀疏注意力的家族另有选中的
  key：自己挑的层多出两个输出，沿用的层多出两个输入；
- :class:`Head`：``x, logits_positions`` → ``logits, hidden``。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.profile import OptimizationProfile
from deepseek_export.reference.mla import AttentionForm, MultiheadLatentAttention, RMSNorm, Selection
from deepseek_export.reference.moe import MLP, MoE, MoeForm
from deepseek_export.reference.rope import rope_frequencies


@dataclass(frozen=True)
class Forms:
    """一个模型实例里 MLA 与 MoE 各用哪种算法。

    Attributes:
        attention, moe: 算法。
        as_ops: 打开的（``expanded``、``dense`` 之外的）各写成 ``dsx::`` 算子，捕获时追踪成一个节点。
        index_int8: 索引 key 存成 int8，见 :mod:`~deepseek_export.ops.int8_index`。
    """

    attention: AttentionForm
    moe: MoeForm
    as_ops: bool = False
    index_int8: bool = False

    @classmethod
    def for_capture(cls, profile: OptimizationProfile) -> Forms:
        """捕获用：打开的优化写成 ``dsx::`` 算子，关闭的写成普通算子。"""
        # 算法由函数体定，追踪出来的块与它无关：总写 auto，几种 mla.form 共用一份追踪。
        attention: AttentionForm = "auto" if profile.mla.enabled else "expanded"
        moe: MoeForm = "sparse" if profile.moe.enabled else "dense"
        return cls(attention, moe, as_ops=True, index_int8=profile.dsa.index_cache_dtype == "int8")

    @classmethod
    def for_reference(cls, profile: OptimizationProfile) -> Forms:
        """对齐校验用：同一个 profile 的 eager 参考实现。"""
        attention: AttentionForm = profile.mla.form if profile.mla.enabled else "expanded"
        moe: MoeForm = "sparse" if profile.moe.enabled else "dense"
        return cls(attention, moe, index_int8=profile.dsa.index_cache_dtype == "int8")


class Embed(nn.Module):
    """词嵌入与本次各位置的 cos/sin（所有层共用）。

    Args:
        config: 模型配置。
        position_offset: 位置的平移；主模型是 0，第 k 个 MTP 模块的第 i 行对应 token ``i+k+1``，平移 ``k+1``。
    """

    def __init__(self, config: ModelConfig, position_offset: int = 0) -> None:
        super().__init__()
        self.position_offset, self.scale = position_offset, config.embed_scale
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # 显式放在 CPU：捕获时模型其余部分在 meta 设备上，而频率是常量，要进图。
        with torch.device("cpu"):
            self.inv_freq, self.scaling = rope_frequencies(config.rope, config.qk_rope_head_dim)

    def forward(self, input_ids: Tensor, past_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids [B, S] int64、past_lens [B] int64 → x [B, S, D]、cos/sin [B, S, dr/2]。"""
        x = _scaled(self.embed_tokens(input_ids), self.scale)
        positions = past_lens[:, None] + torch.arange(input_ids.shape[1]) + self.position_offset
        angles = positions[:, :, None].float() * self.inv_freq
        return x, (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


class DecoderLayer(nn.Module):
    """一层：注意力与前馈，各带前置 RMSNorm 和残差；A.X-K1 的 MoE 层在加回残差之前再过一个 RMSNorm。

    Args:
        config: 模型配置。
        is_moe: 前馈是 MoE。
        forms: MLA 与 MoE 的算法。
        runs_indexer: 自己挑 key，见 :class:`~deepseek_export.reference.mla.MultiheadLatentAttention`。
    """

    def __init__(self, config: ModelConfig, is_moe: bool, forms: Forms, runs_indexer: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadLatentAttention(
            config, forms.attention, forms.as_ops, runs_indexer, forms.index_int8
        )
        self.borrows = config.indexer is not None and not runs_indexer
        D, inner = config.hidden_size, config.intermediate_size
        self.mlp = MoE(config, forms.moe, forms.as_ops) if is_moe else MLP(D, inner)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp_layernorm = None
        if is_moe and config.post_mlp_norm:
            self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_scale = config.residual_scale

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_lens: Tensor,
        caches: tuple[Tensor, ...],
        selection: Selection = (),
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], Selection]:
        """走一层；参数见 :class:`~deepseek_export.reference.mla.MultiheadLatentAttention`。

        Returns:
            attn_residual [B, S, D]、x [B, S, D]、新缓存、这一层用的 key。
        """
        attention, caches, selection = self.self_attn(
            self.input_layernorm(x), cos, sin, past_lens, caches, selection
        )
        residual = x + _scaled(attention, self.residual_scale)
        mlp = self.mlp(self.post_attention_layernorm(residual))
        if self.post_mlp_layernorm is not None:
            mlp = self.post_mlp_layernorm(mlp)
        return residual, residual + _scaled(mlp, self.residual_scale), caches, selection

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past_lens: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """捕获用的平铺写法：``rest`` 是缓存，沿用别层的 key 时前面还有 ``indices``、``counts``。

        Returns:
            ``(attn_residual, x, *新缓存)``，自己挑 key 的末尾还有 ``indices``、``counts``。
        """
        borrowed, caches = (rest[:2], rest[2:]) if self.borrows else ((), rest)
        residual, x, caches, selection = self.step(x, cos, sin, past_lens, caches, borrowed)
        return residual, x, *caches, *(() if self.borrows else selection)


class Head(nn.Module):
    """最终 RMSNorm 与 lm_head；只给 ``logits_positions`` 指定的行算 logits，长 prompt 不必付 S×V 的代价。"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.scale = 1 / config.logits_divisor

    def forward(self, x: Tensor, logits_positions: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D]、logits_positions [B, L] int64 → logits [B, L, V]、hidden [B, S, D]（最终 norm 之后）。"""
        hidden = self.norm(x)
        index = logits_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.lm_head(_scaled(hidden.gather(1, index), self.scale)), hidden


def _scaled(x: Tensor, scale: float) -> Tensor:
    """乘上缩放；等于 1（MiniCPM3 之外的家族）时图里不多一个节点。"""
    return x if scale == 1 else x * scale


class ReferenceModel(nn.Module):
    """整个模型；参数名与 ONNX initializer 名的对应见 :func:`~deepseek_export.reference.weights.initializer_name`。

    Args:
        config: 模型配置。
        forms: 见 :class:`Forms`。
    """

    def __init__(self, config: ModelConfig, forms: Forms) -> None:
        super().__init__()
        self.config, self.forms = config, forms
        self.embed = Embed(config)
        self.layers = nn.ModuleList(
            DecoderLayer(config, config.is_moe_layer(i), forms, config.runs_indexer(i))
            for i in range(config.num_hidden_layers)
        )
        self.head = Head(config)

    def forward(
        self, input_ids: Tensor, past_lens: Tensor, logits_positions: Tensor, caches: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """与 ``model.onnx`` 相同的 I/O 契约。

        Args:
            input_ids: [B, S] int64。
            past_lens: [B] int64。
            logits_positions: [B, L] int64，取本次 S 行中的哪几行。
            caches: 每层一个元组，见 :class:`MultiheadLatentAttention`。

        Returns:
            logits [B, L, V]、hidden [B, S, D]、新缓存。
        """
        x, cos, sin = self.embed(input_ids, past_lens)
        updated = []
        selection: Selection = ()
        for layer, cache in zip(self.layers, caches, strict=True):
            assert isinstance(layer, DecoderLayer)
            _, x, new, selection = layer.step(x, cos, sin, past_lens, cache, selection)
            updated.append(new)
        logits, hidden = self.head(x, logits_positions)
        return logits, hidden, updated

    def empty_caches(
        self, batch: int, capacity: int, dtype: torch.dtype | None = None
    ) -> list[tuple[Tensor, ...]]:
        """全零缓存；``dtype`` 缺省为模型 dtype。"""
        dtype = dtype or self.head.norm.weight.dtype
        compute = self.head.norm.weight.dtype
        return [
            tuple(
                torch.zeros(batch, tensor.heads, capacity, tensor.width, dtype=tensor.dtype)
                for tensor in cache_tensors(self.config, self.forms, dtype, compute, layer)
            )
            for layer in range(len(self.layers))
        ]


#: 索引 key 的缓存；只有自己挑 key 的层有。
INDEX_CACHE = "index_cache"


@dataclass(frozen=True)
class CacheTensor:
    """一层的一个缓存张量 [B, heads, T, width]。"""

    name: str
    heads: int
    width: int
    dtype: torch.dtype


def cache_tensors(
    config: ModelConfig,
    forms: Forms,
    dtype: torch.dtype,
    compute: torch.dtype,
    layer: int,
    aligned: bool = False,
) -> list[CacheTensor]:
    """第 ``layer`` 层（MTP 层接在主干之后）有哪些缓存。

    Args:
        config, forms: 模型配置与算法。
        dtype: 缓存的 dtype；索引 key 也用它，除非 ``forms.index_int8``。
        compute: 计算 dtype；潜缓存是 int8 而索引 key 不是时，索引 key 按它存。
        layer: 第几层。
        aligned: TensorRT 的目标的，见 :meth:`~deepseek_export.checkpoint.ModelConfig.latent_cache_width`。
    """
    H = config.num_attention_heads
    if forms.attention == "expanded":
        tensors = [
            CacheTensor("k_cache", H, config.qk_head_dim, dtype),
            CacheTensor("v_cache", H, config.v_head_dim, dtype),
        ]
    else:
        width = config.latent_cache_width(dtype == torch.int8, aligned)
        tensors = [CacheTensor("kv_cache", 1, width, dtype)]
    if config.indexer is not None and config.runs_indexer(layer):
        stored = compute if dtype == torch.int8 else dtype
        stored = torch.int8 if forms.index_int8 else stored
        tensors.append(CacheTensor(INDEX_CACHE, 1, config.index_cache_width(forms.index_int8), stored))
    return tensors
