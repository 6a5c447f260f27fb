"""loss 层：舍入的代价。权重量化的 bundle 比未量化的 PyTorch 差多少，量两样：logits 与给定文本上的困惑度；窄缓存的只量 logits。

MoE 模型里误差分两种：逐元素的舍入，以及路由在近平局处翻到另一个专家，从那一行起合理地不同（后面的行经由注意力看得到它）。两者分开
报告，不让后者掩盖前者，也不因前者小就不提后者。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from deepseek_export.bundle import Manifest
from deepseek_export.capture import names
from deepseek_export.capture.bodies import gate_attributes
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import MOE_GATE
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.inputs import cache_feeds
from deepseek_export.parity.keys import index_int8, router_dtype
from deepseek_export.parity.logits import logits_cases
from deepseek_export.parity.report import Case, Perplexity, QuantLoss, compare
from deepseek_export.parity.routing import row_margin
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import PERPLEXITY_RATIO
from deepseek_export.progress import Progress
from deepseek_export.reference import Forms, ReferenceModel, load_reference
from deepseek_export.reference.mla import Selection
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.reference.moe import MoE
from deepseek_export.reference.weights import torch_dtype

_WINDOW = 512


def run(check: Check, context: Context) -> Iterator[Case]:
    """量化的 bundle 量 logits 与困惑度，缓存比模型窄的只量 logits。"""
    yield from (_cache if context.manifest.quantization is None else _quantized)(check, context)


def _cache(check: Check, context: Context) -> Iterator[Case]:
    """窄缓存的代价：与缓存没有舍入的基准比。"""
    manifest, (key,), oracle = context.manifest, check.keys, context.want(check)
    for i, row in enumerate(context.rows[: check.prompts]):
        with context.step(f"logits[{i}]"):
            got, want = context.generator.logits([row])[0], oracle.logits(row)
        kept = f"{manifest.cache.dtype} 缓存" + ("、int8 索引 key" if index_int8(manifest) else "")
        name = f"logits[{i}]，{kept}对 {manifest.dtype} ({len(row)} tokens)"
        margin = row_margin(manifest, context.model, row)
        yield from logits_cases("loss", name, key, got, want, margin, router_dtype(manifest))


def _quantized(check: Check, context: Context) -> Iterator[Case]:
    """logits 的相对误差与困惑度，对没有量化的基准；数字另记在 ``context.loss``。"""
    manifest, oracle, generator = context.manifest, context.want(check), context.generator
    quantization, (first, every) = manifest.quantization, check.keys
    assert quantization is not None
    plain = load_reference(context.checkpoint, Forms.for_reference(manifest.profile), manifest.dtype)
    got, want, same = [], [], []
    for i, row in enumerate(context.rows[: check.prompts]):
        with context.step(f"logits[{i}]"):
            got.append(generator.logits([row])[0])
            want.append(oracle.logits(row))
            same.append(_before_a_flip(manifest, context.graph(check.graph), plain, row))
    a, b, kept = np.concatenate(got), np.concatenate(want), np.concatenate(same)
    whole, strict = compare("loss", f"logits，全部 {len(b)} 个 token", every, a, b), None
    if kept.any():
        name = f"logits，路由分叉之前的 {int(kept.sum())} 个 token"
        strict = compare("loss", name, first, a[kept], b[kept])
        yield strict
    yield whole
    assert whole.measure is not None
    context.loss = loss = QuantLoss(
        kind=quantization.kind,
        block=quantization.block,
        tokens=len(b),
        before_a_flip=int(kept.sum()),
        relative_error=whole.measure.relative,
        relative_error_before_a_flip=strict.measure.relative if strict and strict.measure else None,
    )
    if context.passage is None:
        return
    name, ids = context.passage
    window, limit = min(_WINDOW, manifest.model.max_position_embeddings), PERPLEXITY_RATIO[quantization.kind]
    mine, theirs = (
        _perplexity(logits, ids, window, context.progress)
        for logits in (lambda part: generator.logits([part])[0], oracle.logits)
    )
    ratio = mine / theirs
    note = f"{mine:.4g}，未量化 {theirs:.4g}，之比 {ratio:.4f}（限 {limit}）"
    yield Case(level="loss", name=f"困惑度（{name}）", passed=ratio <= limit, note=note)
    loss.perplexity = Perplexity(text=name, tokens=len(ids), bundle=mine, unquantized=theirs)


def _perplexity(
    logits: Callable[[Sequence[int]], np.ndarray], ids: Sequence[int], window: int, progress: Progress
) -> float:
    """切成不重叠的窗，窗内每个 token 由它之前的预测；各窗的第一个不计。"""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        progress.advance(0, f"困惑度 {start}/{len(ids)}")
        part = list(ids[start : start + window])
        if len(part) < 2:
            break
        scores = torch.from_numpy(logits(part[:-1])).double().log_softmax(-1)
        total -= float(scores[torch.arange(len(part) - 1), torch.tensor(part[1:])].sum())
        count += len(part) - 1
    return math.exp(total / count)


@torch.no_grad()
def _before_a_flip(
    manifest: Manifest, graph: ModelGraph, plain: ReferenceModel, row: Sequence[int]
) -> np.ndarray:
    """到这个 token 为止，每一行在每一层都选中与未量化的参考模型相同的专家；图里没有路由节点时全是真。"""
    gates = [site for site in manifest.main.sites if site.op == MOE_GATE.name]
    if not gates:
        return np.ones(len(row), bool)
    ids, past = torch.tensor([list(row)]), torch.zeros(1, dtype=torch.int64)
    caches = plain.empty_caches(1, len(row), torch_dtype(manifest.cache.dtype))
    feeds = {names.INPUT_IDS: ids.numpy(), names.PAST_LENS: past.numpy()}
    for i, tensors in enumerate(caches):
        feeds |= cache_feeds(manifest, i, tensors)
    mine = graph.run(feeds, [site.inputs[0] for site in gates])
    x, cos, sin = plain.embed(ids, past)
    same = np.ones(len(row), bool)
    logits = iter(mine)
    selection: Selection = ()
    for layer, cache in zip(plain.layers, caches, strict=True):
        assert isinstance(layer, DecoderLayer)
        residual, x, _, selection = layer.step(x, cos, sin, past, cache, selection)
        if isinstance(layer.mlp, MoE):
            gate = layer.mlp.gate
            tokens = layer.post_attention_layernorm(residual).float().flatten(0, 1)
            both = (torch.from_numpy(next(logits)), torch.nn.functional.linear(tokens, gate.weight))
            chosen = [_experts(scores, gate.e_score_correction_bias, plain) for scores in both]
            same &= (chosen[0] == chosen[1]).all(-1).numpy()
    return np.logical_and.accumulate(same)


def _experts(logits: torch.Tensor, bias: torch.Tensor, model: ReferenceModel) -> torch.Tensor:
    """[N, E] → [N, k]，选中的专家，排好序。"""
    return moe_gate(logits, bias, **gate_attributes(model.config))[0].sort(-1).values
