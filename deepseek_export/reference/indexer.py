"""稀疏注意力（DSA）的索引器模块；参数名与检查点一致（``self_attn.indexer.*``）。

出处：DeepSeek-V3.2 技术报告；transformers ``models/deepseek_v32``、``models/glm_moe_dsa``。容易做错的几处：

- k_norm 是带 bias 的 LayerNorm，eps 恒为 1e-6，与 ``config.rms_norm_eps`` 无关；
- 旋转的是**前** ``qk_rope_head_dim`` 个 lane；V3.2 是前后两半，与主注意力的成对不同，GLM-5 才是成对；
- 各头的权重由 float32 的线性层算出，可以是负的。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops import registry as _registry  # noqa: F401  登记 torch.ops.dsx
from deepseek_export.ops.int8_index import hadamard
from deepseek_export.ops.lightning_indexer import lightning_indexer
from deepseek_export.reference.rope import apply_rope

#: k_norm 的 eps，**不是** ``config.rms_norm_eps``。
K_NORM_EPS = 1e-6


class HeadWeights(nn.Module):
    """``weights_proj``：每个索引头的权重；参数与计算始终 float32。"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, D] → [B, S, Hi] float32。"""
        # 与 router 一样先并成二维：量化的 pass 只认三维输入的线性层。
        B, S, D = x.shape
        return F.linear(x.reshape(-1, D).float(), self.weight).view(B, S, self.weight.shape[0])


class Indexer(nn.Module):
    """给每个 query 挑 key。

    Args:
        config: 有 ``indexer`` 的模型配置。
        as_op, int8: 见 :class:`~deepseek_export.reference.model.Forms`（``int8`` 是 ``index_int8``）。
    """

    def __init__(self, config: ModelConfig, as_op: bool = False, int8: bool = False) -> None:
        super().__init__()
        assert config.indexer is not None
        assert config.q_lora_rank is not None
        self.indexer, self.rope_dim, self.as_op = config.indexer, config.qk_rope_head_dim, as_op
        width = config.indexer.head_dim
        # 显式放在 CPU：与 rope 的频率一样，是要进图的常量。
        with torch.device("cpu"):
            self.hadamard = hadamard(width) if int8 else None
        self.wq_b = nn.Linear(config.q_lora_rank, config.indexer.n_heads * width, bias=False)
        self.wk = nn.Linear(config.hidden_size, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=K_NORM_EPS)
        self.weights_proj = HeadWeights(config.hidden_size, config.indexer.n_heads)

    def forward(
        self, x: Tensor, latent: Tensor, cos: Tensor, sin: Tensor, index_cache: Tensor, past_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: [B, S, D]，input_layernorm 之后。
            latent: [B, S, q_lora_rank]，q_a_layernorm 之后，也就是 q_b_proj 的输入。
            cos, sin: [B, S, dr/2]，主注意力的那一份。
            index_cache: [B, 1, T, iw]。
            past_lens: [B] int64。

        Returns:
            indices [B, S, topk] int32、counts [B, S] int32、新的 index_cache，见
            :func:`~deepseek_export.ops.lightning_indexer.lightning_indexer`。
        """
        select = torch.ops.dsx.lightning_indexer if self.as_op else lightning_indexer
        q, w, k = self.project(x, latent, cos, sin)
        indices, counts, cache = select(q, w, k, index_cache, past_lens, self.indexer.topk)
        return indices, counts, cache

    def project(self, x: Tensor, latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, Hi, di]、w [B, S, Hi] float32、k [B, S, di]：打分要的三样；参数见 :meth:`forward`。

        q、k 已旋转；索引缓存是 int8 的还过了 Hadamard 变换。
        """
        c = self.indexer
        B, S, _ = x.shape
        q = self._rotated(self.wq_b(latent).view(B, S, c.n_heads, c.head_dim), cos, sin)
        k = self._rotated(self.k_norm(self.wk(x)).unsqueeze(2), cos, sin).squeeze(2)
        if self.hadamard is not None:
            q, k = (torch.matmul(part, self.hadamard.to(part.dtype)) for part in (q, k))
        return q, self.weights_proj(x), k

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """前 dr 个 lane 旋转，其余原样；x [B, S, H, di]。"""
        rotated, plain = x.split([self.rope_dim, x.shape[-1] - self.rope_dim], dim=-1)
        return torch.cat([apply_rope(rotated, cos, sin, self.indexer.rope_layout), plain], dim=-1)
