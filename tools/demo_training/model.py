"""训练用的 DeepSeek-V3：纯 PyTorch、处处可导，``state_dict`` 的键就是 HF 检查点里的张量名。

参考实现（``deepseek_export.reference``）用不可导的自定义算子，不能拿来训练；两者数值一致由单元测试保证。
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """RMSNorm；eps 固定 1e-6，演示配置的 ``rms_norm_eps`` 也是它。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """没有偏置的 Linear。"""
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """DeepSeek-V3 的 RoPE：偶数道与奇数道成对旋转，结果按前后两半拼接。x [B, H, T, dr]。"""
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class Attention(nn.Module):
    """MLA，展开成逐头 K/V 的训练写法。"""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.nope, self.rope = (
            c["num_attention_heads"],
            c["qk_nope_head_dim"],
            c["qk_rope_head_dim"],
        )
        self.value, self.rank = c["v_head_dim"], c["kv_lora_rank"]
        hidden, width = c["hidden_size"], self.nope + self.rope
        self.q_a_proj = linear(hidden, c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"])
        self.q_b_proj = linear(c["q_lora_rank"], self.heads * width)
        self.kv_a_proj_with_mqa = linear(hidden, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, hidden)

    def forward(self, x: Tensor, rope: Rope, past: list[KeyValue]) -> tuple[Tensor, KeyValue]:
        """x [B, T, D] → 输出 [B, T, D] 与本次的 K/V。

        ``past`` 为空是普通的因果注意力。否则是 MTP 的第 s 次递归应用：位置 i 看第一次应用在 ≤ i 处的 K/V，
        再看之后各次应用在 i 处自己的 K/V，与推理时只有一份 MTP 缓存的情形完全相同。
        """
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(B, T, self.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, self.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), rope).expand(-1, self.heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, rope)], dim=-1) * (self.nope + self.rope) ** -0.5
        k = torch.cat([k_nope, k_rope], dim=-1)
        first, *own = [*past, (k, v)]
        mask = torch.full((T, T), -math.inf).triu(1)
        scores = [q @ first[0].transpose(-1, -2) + mask]
        scores += [(q * key).sum(-1, keepdim=True) for key, _ in own]
        weights = torch.cat(scores, dim=-1).softmax(-1) if own else scores[0].softmax(-1)
        out = weights[..., :T] @ first[1]
        for index, (_, values) in enumerate(own):
            out = out + weights[..., T + index, None] * values
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1)), (k, v)


class MLP(nn.Module):
    """SwiGLU。"""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """noaux_tc router；``counts`` 收集自上次 :meth:`take_load` 以来各次前向里各专家分到的 token 数。"""

    e_score_correction_bias: Tensor

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, experts = c, c["n_routed_experts"]
        self.weight = nn.Parameter(torch.zeros(experts, c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.counts: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] → 专家号与权重，各 [N, k]。"""
        scores = F.linear(x, self.weight).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).view(len(x), self.c["n_group"], -1)
            groups = choice.topk(2, dim=-1)[0].sum(-1).topk(self.c["topk_group"], dim=-1)[1]
            keep = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter_(1, groups, True)
            choice = choice.masked_fill(~keep.unsqueeze(-1), -math.inf).flatten(1)
            ids = choice.topk(self.c["num_experts_per_tok"], dim=-1)[1]
            if self.training:
                self.counts.append(torch.bincount(ids.flatten(), minlength=len(self.weight)))
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.c["routed_scaling_factor"]

    def take_load(self) -> Tensor:
        """取走累计的负载，[E]；``list.append`` 是原子的，几个线程同时前向也不会丢。"""
        load, self.counts = torch.stack(self.counts).sum(0).float(), []
        return load

    @torch.no_grad()
    def update_bias(self, gamma: float) -> Tensor:
        """DeepSeek-V3 的无辅助损失均衡：超载的专家偏置减 gamma，欠载的加 gamma。返回负载。"""
        load = self.take_load()
        self.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
        return load


class MoE(nn.Module):
    """MoE：token 按专家排序后逐专家计算，每个专家只算分给它的 token。"""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = Gate(c)
        self.experts = nn.ModuleList(MLP(hidden, width) for _ in range(c["n_routed_experts"]))
        self.shared_experts = MLP(hidden, width * c["n_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        ids, weights = self.gate(tokens)
        order = ids.flatten().argsort(stable=True)
        rows = order // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=len(self.experts)).tolist()
        parts = tokens[rows].split(counts)
        routed = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        routed = routed * weights.flatten()[order].unsqueeze(-1)
        out = torch.zeros_like(tokens, dtype=routed.dtype).index_add(0, rows, routed)
        return out.view_as(x) + self.shared_experts(x)


class DecoderLayer(nn.Module):
    """一层；编号小于 ``first_k_dense_replace`` 的前馈是稠密的。"""

    def __init__(self, c: dict[str, Any], layer: int) -> None:
        super().__init__()
        dense = layer < c["first_k_dense_replace"]
        self.self_attn = Attention(c)
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"]) if dense else MoE(c)
        self.input_layernorm = RMSNorm(c["hidden_size"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"])

    def forward(self, x: Tensor, rope: Rope, past: list[KeyValue]) -> tuple[Tensor, KeyValue]:
        out, kv = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class MtpLayer(DecoderLayer):
    """MTP 模块：eh_proj 的输入先词嵌入、后隐状态；输出经过 ``shared_head.norm``。"""

    def __init__(self, c: dict[str, Any], layer: int) -> None:
        super().__init__(c, layer)
        hidden = c["hidden_size"]
        self.enorm, self.hnorm, self.eh_proj = RMSNorm(hidden), RMSNorm(hidden), linear(2 * hidden, hidden)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(hidden)})

    def draft(
        self, embed: Tensor, hidden: Tensor, rope: Rope, past: list[KeyValue]
    ) -> tuple[Tensor, KeyValue]:
        """应用一次，返回隐状态（乘 ``lm_head`` 就是草稿的 logits）与本次的 K/V。"""
        x = self.eh_proj(torch.cat([self.enorm(embed), self.hnorm(hidden)], dim=-1))
        x, kv = self(x, rope, past)
        return self.shared_head["norm"](x), kv


class Backbone(nn.Module):
    """主干与 MTP 层（接在主干之后编号）。"""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.depth = c["num_hidden_layers"]
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        layers: list[nn.Module] = [DecoderLayer(c, layer) for layer in range(self.depth)]
        drafts = [MtpLayer(c, self.depth)] if c["num_nextn_predict_layers"] else []
        self.layers = nn.ModuleList([*layers, *drafts])
        self.norm = RMSNorm(c["hidden_size"])


class DemoModel(nn.Module):
    """演示模型。

    Args:
        config: HF 的 ``config.json`` 内容（普通 RoPE、有 q_lora、至多一个 MTP 模块、不共享词嵌入）。
        seed: 初始化的种子。
    """

    def __init__(self, config: dict[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = linear(config["hidden_size"], config["vocab_size"])
        half = torch.arange(0, config["qk_rope_head_dim"], 2) / config["qk_rope_head_dim"]
        self.frequencies = config["rope_theta"] ** -half.float()
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """Linear 保方差；写回残差的投影再除以 sqrt(2L)。"""
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            std = 1 / math.sqrt(weight.shape[-1])
            if name.endswith("embed_tokens.weight"):
                std = 1.0
            elif name.endswith(("lm_head.weight", "mlp.gate.weight")):
                std /= 4
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.model.depth)
            nn.init.normal_(weight, 0.0, std, generator=random)

    @property
    def gates(self) -> list[Gate]:
        """各 MoE 层的 router，有 MTP 时最后一个属于 MTP 层。"""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def rope(self, start: int, length: int) -> Rope:
        """位置 ``start .. start+length-1`` 的 cos/sin，各 [T, dr/2]。"""
        angles = torch.arange(start, start + length).float()[:, None] * self.frequencies
        return angles.cos(), angles.sin()

    def trunk(self, ids: Tensor) -> Tensor:
        """ids [B, T] → 最终 norm 之后的隐状态 [B, T, D]；MTP 的输入就是它。"""
        x, rope = self.model.embed_tokens(ids), self.rope(0, ids.shape[1])
        for layer in self.model.layers[: self.model.depth]:
            x, _ = layer(x, rope, [])
        return self.model.norm(x)

    def drafts(self, ids: Tensor, hidden: Tensor, depth: int, start: int = 1, rows: Tensor | None = None):
        """递归应用 MTP 模块，逐次给出隐状态 [B, T, D]。

        第 s 次在位置 i 的输入是词 ``ids[:, i+s]`` 与上一次的输出（第一次是主干的隐状态），预测 ``ids[:, i+s+1]``；
        第二次起只算 ``rows`` 指定的几行（省训练时间），缺省全算。``ids`` 至少有 T+depth 个词。没有 MTP 模块就一次也不给。
        """
        T, past = hidden.shape[1], list[KeyValue]()
        for step in range(1, depth + 1) if self.config["num_nextn_predict_layers"] else ():
            if step == 2 and rows is not None:
                ids, hidden = ids[rows], hidden[rows]
                past = [(key[rows], value[rows]) for key, value in past]
            embed = self.model.embed_tokens(ids[:, step : step + T])
            rope = self.rope(start + step - 1, T)
            hidden, kv = cast(MtpLayer, self.model.layers[-1]).draft(embed, hidden, rope, past)
            past.append(kv)
            yield hidden
