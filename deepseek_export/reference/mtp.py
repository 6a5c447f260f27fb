"""MTP（多 token 预测）模块；参数名与 DeepSeek 检查点一致（``model.layers.{num_hidden_layers + k}``）。

出处：DeepSeek-V3（arXiv 2412.19437）§2.2；transformers ``modeling_layers.py`` 的 ``MtpLayer``。

第 k 个模块的第 i 行：``h' = block(eh_proj([enorm(embed(t_{i+k+1})); hnorm(h_i)]))``，再过 ``shared_head.norm`` 与主模型的 lm_head，
预测 ``t_{i+k+2}``。注意：

- ``h_i`` 是主模型**最终 norm 之后**的 hidden；第 k>0 个模块的 ``h_i`` 是前一个模块 ``shared_head.norm`` 之后的输出；
- 拼接时 embedding 在前、hidden 在后；
- 词嵌入与 lm_head 就是主模型的那一份。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.reference.mla import RMSNorm
from deepseek_export.reference.model import DecoderLayer, Embed, Forms


class SharedHead(nn.Module):
    """检查点里 ``shared_head`` 这一级：只有 norm 是 MTP 自己的。"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MtpModule(DecoderLayer):
    """一个 MTP 模块：合并、一层解码层、``shared_head.norm``。

    Args:
        config: 模型配置。
        index: 第几个模块（从 0 数）。
        forms: MLA 与 MoE 的算法。
    """

    def __init__(self, config: ModelConfig, index: int, forms: Forms) -> None:
        layer = config.num_hidden_layers + index
        super().__init__(config, config.is_moe_layer(layer), forms, config.runs_indexer(layer))
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def combine(self, embedding: Tensor, prev_hidden: Tensor) -> Tensor:
        """embedding、prev_hidden 都是 [B, S, D] → 解码层的输入 [B, S, D]。"""
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(prev_hidden)], dim=-1))

    def forward(  # type: ignore[override]
        self,
        embedding: Tensor,
        prev_hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_lens: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        """返回 ``(combined, attn_residual, x, hidden, *新缓存)``，前四个都是 [B, S, D]；hidden 在 ``shared_head.norm`` 之后。

        自己挑的 key 没有别的层用，不返回。
        """
        combined = self.combine(embedding, prev_hidden)
        residual, x, updated, _ = self.step(combined, cos, sin, past_lens, caches)
        return combined, residual, x, self.shared_head.norm(x), *updated


class DraftHead(nn.Module):
    """取指定行、过主模型的 lm_head；最后一行的 argmax 就是草稿 token。"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, logits_positions: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, S, D]、logits_positions [B, L] → logits [B, L, V]、draft_id [B] int64。"""
        index = logits_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = self.lm_head(hidden.gather(1, index))
        return logits, logits[:, -1].float().argmax(-1)


class DraftModel(nn.Module):
    """一个完整的草稿模型：与 ``mtp.onnx`` 相同的 I/O。

    Args:
        config: 模型配置。
        index: 第几个 MTP 模块。
        forms: MLA 与 MoE 的算法。
    """

    def __init__(self, config: ModelConfig, index: int, forms: Forms) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.embed = Embed(config, position_offset=index + 1)
        self.mtp = MtpModule(config, index, forms)
        self.head = DraftHead(config)

    def forward(
        self,
        input_ids: Tensor,
        prev_hidden: Tensor,
        past_lens: Tensor,
        logits_positions: Tensor,
        caches: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """
        Args:
            input_ids: [B, S] int64，第 i 行是 token ``i+index+1``。
            prev_hidden: [B, S, D]，见模块说明。
            past_lens: [B] int64，这个模块已缓存的行数。
            logits_positions: [B, L] int64。
            caches: 这个模块自己的缓存，形状同主模型的一层。

        Returns:
            logits [B, L, V]、hidden [B, S, D]、新缓存。
        """
        x, cos, sin = self.embed(input_ids, past_lens)
        _, _, _, hidden, *updated = self.mtp(x, prev_hidden, cos, sin, past_lens, *caches)
        logits, _ = self.head(hidden, logits_positions)
        return logits, hidden, tuple(updated)
