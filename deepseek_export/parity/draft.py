"""MTP 草稿模型的参考实现、输入与它的块。

参照是 dsx 的 :class:`~deepseek_export.reference.DraftModel`，它与 transformers 自己的 MTP 相等由 specs/mtp 的契约测试证明。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_export.bundle import Manifest
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.capture import names
from deepseek_export.parity.block import Block, Output
from deepseek_export.parity.blocks import attention_block, embed_block, mlp_block
from deepseek_export.parity.checks import PHASES
from deepseek_export.parity.keys import Keys
from deepseek_export.parity.routing import router_margin
from deepseek_export.reference import DraftModel, ReferenceModel
from deepseek_export.reference.weights import torch_dtype

_SLACK = 3


@dataclass(frozen=True)
class DraftRun:
    """一个 MTP 模块的输入：参考模型给出的 hidden 与错开的 token。

    Attributes:
        entry: manifest 里的这张图。
        draft: 参考实现。
        tokens: [B, S]，第 i 行是 token ``i+index+1``。
        hidden: [B, S, D]，主模型或前一个模块的 hidden。
        caches: 全零缓存。
    """

    entry: GraphEntry
    draft: DraftModel
    tokens: Tensor
    hidden: Tensor
    caches: tuple[Tensor, ...]

    @property
    def past(self) -> Tensor:
        """全零的 past_lens。"""
        return torch.zeros(self.tokens.shape[0], dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """取全部行的 logits。"""
        return torch.arange(self.tokens.shape[1]).expand(self.tokens.shape[0], -1)

    def reference(self) -> tuple[Tensor, Tensor]:
        """参考实现整个跑一遍：logits 与 hidden。"""
        logits, hidden, _ = self.draft(self.tokens, self.hidden, self.past, self.positions, self.caches)
        return logits, hidden

    def margin(self) -> Tensor:
        """参考实现里每个 token 的路由离换一个专家有多远，[B, S]。"""
        x, cos, sin = self.draft.embed(self.tokens, self.past)
        _, residual, *_ = self.draft.mtp(x, self.hidden, cos, sin, self.past, *self.caches)
        return router_margin(self.draft.mtp, residual, self.draft.config)


@torch.no_grad()
def draft_runs(
    manifest: Manifest, model: ReferenceModel, drafts: Sequence[DraftModel], rows: Sequence[Sequence[int]]
) -> Iterator[DraftRun]:
    """逐个 MTP 模块准备输入；后一个模块的 hidden 是前一个的输出。

    Args:
        manifest: bundle 的 manifest。
        model: 主模型的参考实现，提供 hidden。
        drafts: 各 MTP 模块的参考实现。
        rows: 等长的 token 序列。
    """
    ids = torch.tensor([list(row) for row in rows])
    B, total = ids.shape
    length = total - len(drafts)
    cache_dtype = torch_dtype(manifest.cache.dtype)
    past, positions = torch.zeros(B, dtype=torch.int64), torch.zeros((B, 1), dtype=torch.int64)
    _, hidden, _ = model(ids[:, :length], past, positions, model.empty_caches(B, length, cache_dtype))
    for draft, entry in zip(drafts, manifest.drafts, strict=True):
        tokens = ids[:, draft.index + 1 : draft.index + 1 + length]
        run = DraftRun(entry, draft, tokens, hidden, model.empty_caches(B, length + _SLACK, cache_dtype)[0])
        yield run
        _, hidden = run.reference()


@torch.no_grad()
def draft_blocks(manifest: Manifest, run: DraftRun, keys: Keys) -> Iterator[Block]:
    """一个 MTP 模块的块：嵌入、合并、注意力、前馈、最终 norm、输出头；前 S-1 行做 prefill，最后一行做解码。"""
    last = run.tokens.shape[1] - 1
    caches: Sequence[Tensor] = run.caches
    for phase, rows, start in zip(PHASES, (slice(0, last), slice(last, None)), (0, last), strict=True):
        caches = yield from _phase(manifest, run, keys, phase, rows, run.past + start, caches)


def _phase(manifest: Manifest, run: DraftRun, keys: Keys, phase: str, rows: slice, past: Tensor, caches):
    """一个阶段的块；返回参考模型更新后的缓存。"""
    attention, rest = keys
    draft, layer, prefix = run.draft, run.entry.layers[0], f"{run.entry.file} "
    tokens, prev = run.tokens[:, rows], run.hidden[:, rows]
    x, cos, sin = draft.embed(tokens, past)
    combined, residual, out, hidden, *updated = draft.mtp(x, prev, cos, sin, past, *caches)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    logits, _ = draft.head(hidden, positions)

    def simple(label: str, extra: dict[str, Tensor], value: str, want: Tensor) -> Block:
        output = Output(f"{prefix}{label}", value, want.numpy(), rest)
        fed = {name: tensor.numpy() for name, tensor in extra.items()}
        return Block(f"{prefix}{label}", phase, {**feeds, **fed}, (output,))

    feeds = {names.INPUT_IDS: tokens.numpy(), names.PAST_LENS: past.numpy()}
    yield embed_block(rest, prefix, phase, feeds, (x, cos, sin))
    feeds |= {names.EMBED_X: x.numpy(), names.EMBED_COS: cos.numpy(), names.EMBED_SIN: sin.numpy()}
    yield simple("eh_proj", {names.PREV_HIDDEN: prev}, names.COMBINED, combined)
    feeds[names.COMBINED] = combined.numpy()
    yield attention_block(manifest, attention, prefix, phase, feeds, (layer, 0), residual, caches, updated)
    margin = router_margin(draft.mtp, residual, draft.config).numpy()
    yield mlp_block(rest, prefix, phase, feeds, layer, residual, out, margin)
    yield simple("hidden", {names.layer_output(layer): out}, names.HIDDEN, hidden)
    head = {names.HIDDEN: hidden, names.LOGITS_POSITIONS: positions}
    yield simple("head", head, names.LOGITS, logits)
    return tuple(updated)
