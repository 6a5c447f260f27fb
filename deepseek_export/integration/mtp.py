"""transformers 模型的 MTP 模块：从原检查点读回被丢掉的权重，装进 transformers 自己的解码层。

transformers 加载主模型时丢弃 MTP 层，而且把层号写死成 61；这里按 ``num_hidden_layers`` 算，读的是检查点本身。
模块放在模型之外，不进 state_dict；语义见 :mod:`deepseek_export.reference.mtp`。
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from deepseek_export.checkpoint import Checkpoint, ModelConfig, require_mtp
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.recipe import mtp_recipes
from deepseek_export.errors import DsxError
from deepseek_export.integration.compat import cache_name
from deepseek_export.paths import path_kind
from deepseek_export.reference.weights import load_tensor


class MtpModule(nn.Module):
    """一个 MTP 模块：``norm(block(eh_proj([enorm(embedding); hnorm(hidden)])))``。

    Args:
        model: 主模型；解码层与 norm 用它的类和 config。
        layer: 检查点里的层号。
    """

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        config = model.config
        norm_class = type(model.model.norm)
        self.enorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = type(model.model.layers[-1])(config, layer)
        self.block.self_attn.layer_idx = 0  # 自己的缓存只有一层
        self.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embedding: Tensor, prev_hidden: Tensor, **layer_inputs: Any) -> Tensor:
        """embedding、prev_hidden [B, S, D] → hidden [B, S, D]；其余原样交给解码层。"""
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(prev_hidden)], dim=-1))
        return self.norm(self.block(x, **layer_inputs))


@dataclass
class MtpStats:
    """最近一次 ``generate`` 的统计，按行累计。

    Attributes:
        main_calls: 主模型的调用次数，含 prefill。
        drafted: 起草了几个 token。
        accepted: 接受了几个草稿。
        tokens: 输出了几个 token。
    """

    main_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0


@dataclass
class MtpDraft:
    """装在模型上的草稿器。

    Attributes:
        module: 第一个 MTP 模块；多于一个草稿时递归使用。
        source: 权重所在的检查点目录；装着的模型可以深拷贝、可以 pickle，所以不留打开的检查点。
        num_draft_tokens: 每步起草几个。
        stats: 最近一次 ``generate`` 的统计。
    """

    module: MtpModule
    source: Path
    num_draft_tokens: int
    stats: MtpStats = field(default_factory=MtpStats)

    def hidden(self, model: Any, tokens: Tensor, prev_hidden: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        """跑一次 MTP 模块。

        Args:
            model: 主模型；词嵌入与旋转编码是它的。
            tokens: [B, S]，每列的**下一个** token。
            prev_hidden: [B, S, D]，每列的 hidden（主模型最终 norm 之后，或上一个草稿的输出）。
            valid: [B, 已有列数 + S]，哪些列是真正的 token；与主模型的缓存同列。
            cache: 草稿自己的缓存，会追加 S 列。
        """
        S = tokens.shape[1]
        embedding = model.get_input_embeddings()(tokens)
        positions = column_positions(valid)[:, -S:] + 1
        return self.module(
            embedding,
            prev_hidden,
            attention_mask=_causal_mask(valid, S, model.config._attn_implementation, embedding.dtype),
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(embedding, position_ids=positions),
            use_cache=True,
            **{cache_name(): cache},
        )


def column_positions(valid: Tensor) -> Tensor:
    """每列的位置：它左边有几个真正的 token。[B, T] → [B, T]。"""
    return (valid.cumsum(1) - valid).long()


def _causal_mask(valid: Tensor, S: int, implementation: str, dtype: torch.dtype) -> Tensor:
    """末尾 S 列的因果遮罩 [B, 1, S, T]；每列总看得见自己，不会有整行看不见的。"""
    T = valid.shape[1]
    columns = torch.arange(T, device=valid.device)
    own = columns[T - S :, None]
    visible = (valid.bool()[:, None] & (columns <= own)) | (columns == own)
    visible = visible.unsqueeze(1)
    if implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=valid.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


def load_mtp(
    model: PreTrainedModel, config: ModelConfig, checkpoint: Path | str | None, num_draft_tokens: int
) -> MtpDraft:
    """从检查点读 MTP 模块。

    Args:
        model: 主模型。
        config: 它的类型化配置。
        checkpoint: 检查点目录；``None`` 用模型加载时的那个。
        num_draft_tokens: 每步起草几个。

    Raises:
        DsxError: ``DSX-E806`` 不知道从哪里读，或那里是另一个模型；``DSX-E119`` 检查点没有 MTP 权重；1xx 检查点有问题。
    """
    path = Path(checkpoint if checkpoint is not None else model.config.name_or_path or "")
    todo = "给出检查点目录：apply(model, profile, checkpoint=DIR)"
    if not str(path) or path_kind(path / "config.json", "DSX-E806") != "file":
        raise DsxError("DSX-E806", f"模型加载自 {str(path)!r}，那里没有检查点", todo)
    source = Checkpoint.open(path)
    require_mtp(source)
    if _architecture(source.config) != _architecture(config):
        raise DsxError("DSX-E806", f"{path} 的 config.json 与模型的 config 不同", todo)
    layer = config.num_hidden_layers
    with torch.device("meta"):
        module = MtpModule(model, layer)
    module.load_state_dict(_state(source, layer, config.dtype), strict=True, assign=True)
    module.to(model.device).eval().requires_grad_(False)
    return MtpDraft(module, path.absolute(), num_draft_tokens)


def new_draft_cache() -> Cache:
    """草稿模块的空缓存。"""
    return DynamicCache()


def _architecture(config: ModelConfig) -> ModelConfig:
    """去掉与架构无关的字段：同一个检查点可以按别的 dtype 加载，特殊 token 也常被改。"""
    return dataclasses.replace(
        config, dtype="float32", bos_token_id=None, eos_token_ids=(), pad_token_id=None
    )


def _state(source: Checkpoint, layer: int, dtype: str) -> dict[str, Tensor]:
    """检查点的 MTP 张量 → :class:`MtpModule` 的 state_dict；专家按 transformers 的布局把 gate 与 up 叠在一起。"""
    recipes = bind_recipes(mtp_recipes(source.config, 0, cast(Any, dtype)), source)
    prefix = f"model.layers.{layer}."
    loaded = {
        name.removeprefix(prefix): load_tensor(name, recipe, source) for name, recipe in recipes.items()
    }
    state = {}
    for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
        state[name] = loaded.pop(name)
    state["norm.weight"] = loaded.pop("shared_head.norm.weight")
    experts = "mlp.experts.*."
    if f"{experts}gate_proj.weight" in loaded:
        gate, up, down = (loaded.pop(f"{experts}{name}_proj.weight") for name in ("gate", "up", "down"))
        state["block.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state["block.mlp.experts.down_proj"] = down
    return state | {f"block.{name}": tensor for name, tensor in loaded.items()}
