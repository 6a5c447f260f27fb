"""一层一层地校准：每一层的输入是前面已经量化了的层算出来的。

一次只有一层的注意力，或一个 MLP、一个专家的权重在内存里；各窗的隐状态一直在。一层里也按先后：q_a、kv_a 先取码，q_b 看到的就是它们取码
之后的输出，依此类推，o_proj、gate 与 up、down 也是。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_export.calibration.gptq import Gram
from deepseek_export.calibration.weights import CalibratedWeights
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.reference.mla import MultiheadLatentAttention, Selection
from deepseek_export.reference.model import DecoderLayer, Forms, cache_tensors
from deepseek_export.reference.moe import MLP, MoE

FORMS = Forms("naive", "sparse")


@dataclass
class Window:
    """校准文本的一窗在两层之间的样子。

    Attributes:
        x: [1, S, D]。
        cos, sin: [1, S, dr/2]。
        selection: 稀疏注意力里前一层挑的 key，沿用的层要用。
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    selection: Selection = field(default=())


def calibrate_layer(
    layer: DecoderLayer, index: int, config: ModelConfig, windows: list[Window], weights: CalibratedWeights
) -> None:
    """校准一层，窗的 ``x`` 换成它的输出。

    Args:
        layer: 一层，装好了权重，专家的除外。
        index: 第几层，MTP 层接在主干之后。
        config: 模型配置。
        windows: 各窗，就地改。
        weights: 读权重、写码。
    """
    prefix = f"model.layers.{index}."
    _attention(layer, index, config, windows, weights)
    normed = [layer.post_attention_layernorm(window.x) for window in windows]
    if isinstance(layer.mlp, MoE):
        outputs = _moe(layer.mlp, f"{prefix}mlp.", config, normed, weights)
    else:
        _mlp(layer.mlp, f"{prefix}mlp.", normed, weights)
        outputs = [layer.mlp(x) for x in normed]
    for window, output in zip(windows, outputs, strict=True):
        if layer.post_mlp_layernorm is not None:
            output = layer.post_mlp_layernorm(output)
        window.x = window.x + layer.residual_scale * output


def gram_of(rows: Iterable[Tensor], width: int) -> Gram:
    """各窗的输入 → Gram 矩阵。"""
    gram = Gram(width)
    for part in rows:
        gram.add(part)
    return gram


def _attention(
    layer: DecoderLayer, index: int, config: ModelConfig, windows: list[Window], weights: CalibratedWeights
) -> None:
    attn, prefix = layer.self_attn, f"model.layers.{index}.self_attn."

    def run(names: tuple[str, ...], inputs: Callable[[Window], Tensor]) -> None:
        linears = {f"{prefix}{n}.weight": found for n in names if (found := _linear(attn, n)) is not None}
        if linears.keys() & weights.formats.calibrated.keys():
            width = next(iter(linears.values())).in_features
            weights.calibrate(linears, gram_of((inputs(window) for window in windows), width))

    def normed(window: Window) -> Tensor:
        return layer.input_layernorm(window.x)

    def latent(window: Window) -> Tensor:
        return attn.kv_a_layernorm(attn.kv_a_proj_with_mqa(normed(window))[..., : config.kv_lora_rank])

    run(("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "indexer.wk"), normed)
    run(("q_b_proj", "indexer.wq_b"), lambda window: attn.query_latent(normed(window)))
    run(("kv_b_proj",), latent)
    run(("o_proj",), lambda window: _before_o_proj(attn, lambda: _attend(layer, index, config, window)))
    for window in windows:
        output, selection = _attend(layer, index, config, window)
        window.x = window.x + layer.residual_scale * output
        window.selection = selection


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """``indexer.wk`` 这样的名字；没有这个线性层的是 ``None``。"""
    found: nn.Module | None = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Linear) else None


def _attend(layer: DecoderLayer, index: int, config: ModelConfig, window: Window) -> tuple[Tensor, Selection]:
    length = window.x.shape[1]
    caches = tuple(
        torch.zeros(1, one.heads, length, one.width, dtype=one.dtype)
        for one in cache_tensors(config, FORMS, torch.float32, torch.float32, index)
    )
    x, past = layer.input_layernorm(window.x), torch.zeros(1, dtype=torch.int64)
    output, _, selection = layer.self_attn(x, window.cos, window.sin, past, caches, window.selection)
    return output, selection


def _before_o_proj(attn: MultiheadLatentAttention, run: Callable[[], object]) -> Tensor:
    """跑一遍注意力，取 o_proj 的输入。"""
    seen: list[Tensor] = []
    handle = attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def _mlp(mlp: MLP, prefix: str, inputs: list[Tensor], weights: CalibratedWeights) -> None:
    """gate 与 up 先，down 看到的是它们取码之后的输出。"""
    gates = {f"{prefix}{name}.weight": getattr(mlp, name) for name in ("gate_proj", "up_proj")}
    weights.calibrate(gates, gram_of(inputs, mlp.gate_proj.in_features))
    inner = (F.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in inputs)
    down = {f"{prefix}down_proj.weight": mlp.down_proj}
    weights.calibrate(down, gram_of(inner, mlp.down_proj.in_features))


def _moe(
    moe: MoE, prefix: str, config: ModelConfig, inputs: list[Tensor], weights: CalibratedWeights
) -> list[Tensor]:
    """专家一个一个来，各用路由到它的 token；没有 token 的也要取码。"""
    tokens = torch.cat([x.flatten(0, 1) for x in inputs])
    gate = moe.gate
    logits = F.linear(tokens, gate.weight)
    ids, shares = moe_gate(logits, gate.e_score_correction_bias, *gate.arguments)
    total = torch.zeros_like(tokens)
    for expert in range(config.n_routed_experts):
        with torch.device("meta"):
            mlp = MLP(config.hidden_size, config.moe_intermediate_size)
        weights.fill(mlp, f"{prefix}experts.{expert}.")
        hit = ids == expert
        rows = hit.any(-1).nonzero().squeeze(-1)
        _mlp(mlp, f"{prefix}experts.{expert}.", [tokens[rows]], weights)
        share = torch.where(hit, shares, 0.0).sum(-1, keepdim=True)[rows]
        total.index_add_(0, rows, mlp(tokens[rows]) * share)
    if moe.shared_experts is not None:
        _mlp(moe.shared_experts, f"{prefix}shared_experts.", [tokens], weights)
        total += moe.shared_experts(tokens)
    return [part.unsqueeze(0) for part in total.split([x.shape[1] for x in inputs])]
