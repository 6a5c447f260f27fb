"""loss 层：权重量化的 bundle 比未量化的 PyTorch 差多少，量两样：logits 与给定文本上的困惑度。

MoE 模型里误差分两种：逐元素的舍入，以及路由在近平局处翻到另一个专家，从那一行起合理地不同（后面的行经由注意力看得到它）。两者分开
报告，不让后者掩盖前者，也不因前者小就不提后者。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from deepseek_export.bundle import Bundle
from deepseek_export.capture import names
from deepseek_export.capture.bodies import gate_attributes
from deepseek_export.errors import DsxError
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.table import MOE_GATE
from deepseek_export.parity.arrays import to_numpy
from deepseek_export.parity.oracle import Oracle
from deepseek_export.parity.report import Case, Perplexity, QuantLoss, compare
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import PERPLEXITY_RATIO
from deepseek_export.paths import MAX_LARGE_TEXT, read_text
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.reference.moe import MoE
from deepseek_export.runtime import BundleTokenizer, Generator

_WINDOW = 512


def read_passage(bundle: Bundle, tokenizer: BundleTokenizer | None, path: Path) -> tuple[str, list[int]]:
    """测困惑度的文本：文件名与 token。

    Raises:
        DsxError: ``DSX-E606``，bundle 没有量化、没有 tokenizer，或文件读不了、不到两个 token。
    """
    if bundle.manifest.quantization is None:
        raise DsxError("DSX-E606", f"{bundle.path} 的权重没有量化，没有损失可量", "去掉 --text")
    if tokenizer is None:
        raise DsxError("DSX-E606", f"{bundle.path} 没有 tokenizer，用不了文本", "去掉 --text")
    try:
        text = read_text(path, MAX_LARGE_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise DsxError(
            "DSX-E606",
            f"{path} 读不了：{getattr(error, 'strerror', None) or error}",
            "给一个 UTF-8 编码的文本文件",
        ) from error
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise DsxError(
            "DSX-E606", f"{path} 只有 {len(ids)} 个 token", "给长一些的文本，至少几百个 token 才有意义"
        )
    return str(path), ids


def loss_cases(
    bundle: Bundle,
    generator: Generator,
    graph: ModelGraph,
    oracle: Oracle,
    plain: ReferenceModel,
    rows: Sequence[Sequence[int]],
    passage: tuple[str, Sequence[int]] | None,
    on_case: Callable[[str], None],
) -> tuple[list[Case], QuantLoss]:
    """logits 的相对误差与困惑度。

    Args:
        bundle: 权重量化的 bundle。
        generator: 它的生成器。
        graph: 它的主图，取每层路由的 logits。
        oracle: 未量化的基准。
        plain: 未量化的参考模型，取每层路由选中的专家。
        rows: 比 logits 的 token 序列。
        passage: 文件名与 token；``None`` 不测困惑度。
        on_case: 每一步开始前调用。
    """
    quantization, dtype = bundle.manifest.quantization, bundle.manifest.dtype
    assert quantization is not None
    kind = quantization.kind
    got, want, same = [], [], []
    for i, row in enumerate(rows):
        on_case(f"logits[{i}]")
        got.append(generator.logits([row])[0])
        want.append(oracle.logits(row))
        same.append(_before_a_flip(bundle, graph, plain, row))
    a, b, kept = np.concatenate(got), np.concatenate(want), np.concatenate(same)
    whole = compare("loss", f"logits，全部 {len(b)} 个 token", "loss_all", dtype, a, b, kind)
    cases, strict = [whole], None
    if kept.any():
        name = f"logits，路由分叉之前的 {int(kept.sum())} 个 token"
        strict = compare("loss", name, "loss", dtype, a[kept], b[kept], kind)
        cases.insert(0, strict)
    assert whole.measure is not None
    loss = QuantLoss(
        kind=kind,
        block=quantization.block,
        tokens=len(b),
        before_a_flip=int(kept.sum()),
        relative_error=whole.measure.relative,
        relative_error_before_a_flip=strict.measure.relative if strict and strict.measure else None,
    )
    if passage is not None:
        name, ids = passage
        limit = bundle.manifest.model.max_position_embeddings
        mine, theirs = (
            _perplexity(logits, ids, min(_WINDOW, limit), on_case)
            for logits in (lambda window: generator.logits([window])[0], oracle.logits)
        )
        ratio = mine / theirs
        note = f"{mine:.4g}，未量化 {theirs:.4g}，之比 {ratio:.4f}（限 {PERPLEXITY_RATIO[kind]}）"
        cases.append(
            Case(level="loss", name=f"困惑度（{name}）", passed=ratio <= PERPLEXITY_RATIO[kind], note=note)
        )
        loss.perplexity = Perplexity(text=name, tokens=len(ids), bundle=mine, unquantized=theirs)
    return cases, loss


def _perplexity(
    logits: Callable[[Sequence[int]], np.ndarray],
    ids: Sequence[int],
    window: int,
    on_case: Callable[[str], None],
) -> float:
    """切成不重叠的窗，窗内每个 token 由它之前的预测；各窗的第一个不计。"""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        on_case(f"困惑度 {start}/{len(ids)}")
        part = list(ids[start : start + window])
        if len(part) < 2:
            break
        scores = torch.from_numpy(logits(part[:-1])).double().log_softmax(-1)
        total -= float(scores[torch.arange(len(part) - 1), torch.tensor(part[1:])].sum())
        count += len(part) - 1
    return math.exp(total / count)


@torch.no_grad()
def _before_a_flip(
    bundle: Bundle, graph: ModelGraph, plain: ReferenceModel, row: Sequence[int]
) -> np.ndarray:
    """到这个 token 为止，每一行在每一层都选中与未量化的参考模型相同的专家；图里没有路由节点时全是真。"""
    gates = [site for site in bundle.manifest.main.sites if site.op == MOE_GATE.name]
    if not gates:
        return np.ones(len(row), bool)
    ids, past = torch.tensor([list(row)]), torch.zeros(1, dtype=torch.int64)
    caches = plain.empty_caches(1, len(row), getattr(torch, bundle.manifest.cache.dtype))
    feeds = {names.INPUT_IDS: ids.numpy(), names.PAST_LENS: past.numpy()}
    for i, tensors in enumerate(caches):
        for entry, tensor in zip(bundle.manifest.cache.tensors, tensors, strict=True):
            feeds[names.cache_input(entry.name, i)] = to_numpy(tensor)
    mine = graph.run(feeds, [site.inputs[0] for site in gates])
    x, cos, sin = plain.embed(ids, past)
    same = np.ones(len(row), bool)
    logits = iter(mine)
    for layer, cache in zip(plain.layers, caches, strict=True):
        assert isinstance(layer, DecoderLayer)
        residual, x, *_ = layer(x, cos, sin, past, *cache)
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
