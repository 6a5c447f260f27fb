"""MTP 草稿模型的校验：每个块 teacher forcing 地比，再整张图从头到尾比 logits。

参照是 dsx 的 :class:`~deepseek_export.reference.DraftModel`，它与 transformers 自己的 MTP 相等由 specs/mtp 的契约测试证明。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.capture import names
from deepseek_export.parity.blocks import mlp_case, to_numpy
from deepseek_export.parity.report import Case, Level, compare
from deepseek_export.parity.routing import router_margin
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.reference import DraftModel, ReferenceModel

_SLACK = 3


@torch.no_grad()
def draft_cases(
    bundle: Bundle,
    model: ReferenceModel,
    drafts: Sequence[DraftModel],
    rows: Sequence[Sequence[int]],
    levels: Sequence[Level],
    on_case: Callable[[str], None],
) -> Iterator[Case]:
    """逐个 MTP 模块比较。

    Args:
        bundle: 被验证的 bundle。
        model: 主模型的参考实现，提供 hidden。
        drafts: 各 MTP 模块的参考实现。
        rows: 等长的 token 序列。
        levels: 含 ``block`` 则逐块比，含 ``model`` 则比整张图的 logits。
        on_case: 每个模块开始前调用。
    """
    ids = torch.tensor([list(row) for row in rows])
    B, total = ids.shape
    length = total - len(drafts)
    past = torch.zeros(B, dtype=torch.int64)
    cache_dtype = getattr(torch, bundle.manifest.cache.dtype)
    positions = torch.zeros((B, 1), dtype=torch.int64)
    _, hidden, _ = model(ids[:, :length], past, positions, model.empty_caches(B, length, cache_dtype))
    for draft, entry in zip(drafts, bundle.manifest.drafts, strict=True):
        on_case(entry.file)
        graph = ModelGraph(bundle, entry.file)
        tokens = ids[:, draft.index + 1 : draft.index + 1 + length]
        caches = model.empty_caches(B, length + _SLACK, cache_dtype)[0]
        logits, output, _ = draft(tokens, hidden, past, torch.arange(length).expand(B, -1), caches)
        if "block" in levels:
            yield from _blocks(bundle, graph, entry, draft, tokens, hidden, caches)
        if "model" in levels:
            step = _feeds(bundle, tokens, past, caches) | {
                names.PREV_HIDDEN: hidden.numpy(),
                names.LOGITS_POSITIONS: torch.arange(length).expand(B, -1).numpy(),
            }
            got = graph.run(step, [names.LOGITS, names.HIDDEN])
            dtype, quant = bundle.manifest.dtype, bundle.manifest.quant
            for name, a, b in zip(("logits", "hidden"), got, (logits, output), strict=True):
                yield compare("model", f"{entry.file} {name}", "logits", dtype, a, b.numpy(), quant)
        hidden = output


def _blocks(
    bundle: Bundle,
    graph: ModelGraph,
    entry: GraphEntry,
    draft: DraftModel,
    tokens: Tensor,
    hidden: Tensor,
    caches,
) -> Iterator[Case]:
    """前 length-1 行做 prefill，最后一行做解码。"""
    last = tokens.shape[1] - 1
    for phase, rows, start in (("prefill", slice(0, last), 0), ("decode", slice(last, None), last)):
        past = torch.full((tokens.shape[0],), start, dtype=torch.int64)
        caches = yield from _phase(
            bundle, graph, entry, draft, phase, tokens[:, rows], hidden[:, rows], past, caches
        )


def _phase(bundle, graph, entry, draft: DraftModel, phase: str, tokens, hidden, past, caches):
    """一个阶段里逐块比较；返回参考模型更新后的缓存。"""
    dtype, quant, layer = bundle.manifest.dtype, bundle.manifest.quant, entry.layers[0]
    x, cos, sin = draft.embed(tokens, past)
    combined, residual, out, final, *updated = draft.mtp(x, hidden, cos, sin, past, *caches)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    logits, _ = draft.head(final, positions)

    def case(name: str, feeds: dict[str, np.ndarray], output: str, want: Tensor) -> Case:
        (got,) = graph.run(feeds, [output])
        limit = graph.attention_dtype if name == "self_attn" else dtype
        return compare("block", f"{entry.file} {name} ({phase})", "block", limit, got, want.numpy(), quant)

    feeds = _feeds(bundle, tokens, past, caches)
    yield case("embed", feeds, names.EMBED_X, x)
    feeds |= {names.EMBED_X: x.numpy(), names.EMBED_COS: cos.numpy(), names.EMBED_SIN: sin.numpy()}
    yield case("eh_proj", {**feeds, names.PREV_HIDDEN: hidden.numpy()}, names.COMBINED, combined)
    feeds[names.COMBINED] = combined.numpy()
    yield case("self_attn", feeds, names.attn_residual(layer), residual)
    feeds[names.attn_residual(layer)] = residual.numpy()
    (got,) = graph.run(feeds, [names.layer_output(layer)])
    margin = router_margin(draft.mtp, residual, draft.config).numpy()
    yield mlp_case(f"{entry.file} mlp ({phase})", dtype, got, out.numpy(), margin, quant)
    feeds[names.layer_output(layer)] = out.numpy()
    yield case("hidden", feeds, names.HIDDEN, final)
    feeds |= {names.HIDDEN: final.numpy(), names.LOGITS_POSITIONS: positions.numpy()}
    yield case("head", feeds, names.LOGITS, logits)
    return tuple(updated)


def _feeds(bundle: Bundle, tokens: Tensor, past: Tensor, caches) -> dict[str, np.ndarray]:
    feeds = {names.INPUT_IDS: tokens.numpy(), names.PAST_LENS: past.numpy()}
    for tensor, cache in zip(bundle.manifest.cache.tensors, caches, strict=True):
        feeds[names.cache_input(tensor.name, 0)] = to_numpy(cache)
    return feeds
