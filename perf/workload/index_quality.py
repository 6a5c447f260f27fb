"""int8 的索引 key 要付多少误差：参考实现，同样的权重，对浮点的索引 key 比选中的集合与 logits；不做 Hadamard 变换的并列。

权重是随机的：各通道差不多大，没有训练过的模型那样突出的几个，变换在这里显不出多少好处。
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek_export.benchmark.spread import Spread
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.parity.selection import mask_of
from deepseek_export.reference import Forms, ReferenceModel, load_reference
from deepseek_export.reference.model import DecoderLayer
from perf.results import Case

_CHUNK = 64


def quality_case(path: Path, prompt: int, threads: int) -> Case:
    """``path`` 是小的 V3.2；``prompt`` 个随机 token 分块走完，每种只算一遍，没有散布。"""
    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(path)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, prompt)))
    exact = load_reference(checkpoint, Forms("absorb", "sparse"))
    want, chosen = _walk(exact, ids)
    values: dict[str, Spread] = {}
    for name, transformed in (("int8", True), ("int8，不变换", False)):
        model = load_reference(checkpoint, Forms("absorb", "sparse", index_int8=True))
        if not transformed:
            for layer in model.layers:
                assert isinstance(layer, DecoderLayer)
                assert layer.self_attn.indexer is not None
                layer.self_attn.indexer.hadamard = None
        got, mine = _walk(model, ids)
        rows = (got - want).norm(dim=-1) / want.norm(dim=-1)
        values[f"{name}.agreement"] = Spread.of([_agreement(a, b) for a, b in zip(mine, chosen, strict=True)])
        values[f"{name}.row_error"] = Spread.of([float(rows.median())])
        values[f"{name}.row_error_p99"] = Spread.of([float(rows.quantile(0.99))])
        values[f"{name}.same_argmax"] = Spread.of([float((got.argmax(-1) == want.argmax(-1)).float().mean())])
    assert checkpoint.config.indexer is not None
    return Case(
        name="int8 索引 key（随机权重）", values=values, facts={"slots": checkpoint.config.indexer.topk}
    )


@torch.no_grad()
def _walk(model: ReferenceModel, ids: Tensor) -> tuple[Tensor, list[np.ndarray]]:
    """越过名额之后各行的 logits [n, V]，与各层、各行选中的遮罩 [n, T]。"""
    indexer, prompt = model.config.indexer, ids.shape[1]
    assert indexer is not None
    caches = model.empty_caches(1, prompt)
    logits: list[Tensor] = []
    masks: list[list[np.ndarray]] = [[] for _ in model.layers]
    for start in range(0, prompt, _CHUNK):
        part = ids[:, start : start + _CHUNK]
        past = torch.tensor([start])
        x, cos, sin = model.embed(part, past)
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            _, x, caches[i], selection = layer.step(x, cos, sin, past, caches[i])
            masks[i].append(mask_of(selection[0].numpy(), prompt)[0])
        logits.append(model.head(x, torch.arange(part.shape[1])[None])[0][0])
    return torch.cat(logits)[indexer.topk :], [np.concatenate(found)[indexer.topk :] for found in masks]


def _agreement(got: np.ndarray, want: np.ndarray) -> float:
    """两个集合的 Dice 系数，各行合起来算；1 是全同。"""
    return float(2 * (got * want).sum() / (got.sum() + want.sum()))
