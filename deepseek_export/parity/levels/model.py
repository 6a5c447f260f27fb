"""model 层：整张图的 logits 与基准比；主模型的一次 prefill、分块、逐 token、长度不等的 batch 各走一遍，草稿模型走一遍。"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepseek_export.capture import names
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.inputs import cache_feeds
from deepseek_export.parity.keys import router_dtype
from deepseek_export.parity.logits import logits_cases
from deepseek_export.parity.report import Case
from deepseek_export.parity.routing import row_margin


def run(check: Check, context: Context) -> Iterator[Case]:
    """主模型逐条 prompt 比；参考模型只用来找路由近平局。草稿模型的输入是参考模型给的。"""
    if check.graph != context.manifest.main.file:
        yield from _draft(check, context)
        return
    manifest, oracle, rows = context.manifest, context.want(check), context.rows[: check.prompts]
    want = [oracle.logits(row) for row in rows]
    margins = [row_margin(manifest, context.model, row) for row in rows]
    (key,), router = check.keys, router_dtype(manifest)
    for way in check.ways:
        with context.step(way.name):
            batches = [rows] if way.batch else [[row] for row in rows]
            logits = [got for batch in batches for got in context.generator.logits(batch, chunk=way.chunk)]
        for i, (got, expected, margin) in enumerate(zip(logits, want, margins, strict=True)):
            name = f"logits[{i}] {way.name} ({len(expected)} tokens)"
            yield from logits_cases("model", name, key, got, expected, margin, router)


@torch.no_grad()
def _draft(check: Check, context: Context) -> Iterator[Case]:
    manifest, run = context.manifest, context.draft_runs[check.graph]
    feeds = {
        names.INPUT_IDS: run.tokens.numpy(),
        names.PAST_LENS: run.past.numpy(),
        names.PREV_HIDDEN: run.hidden.numpy(),
        names.LOGITS_POSITIONS: run.positions.numpy(),
    }
    feeds |= cache_feeds(manifest, run.entry.layers[0], run.caches, 0)
    outputs, margin = (names.LOGITS, names.HIDDEN), run.margin().numpy()
    (key,), router = check.keys, router_dtype(manifest)
    with context.step(check.graph):
        found = context.graph(check.graph).run(feeds, outputs)
    for name, got, want in zip(outputs, found, run.reference(), strict=True):
        label = f"{check.graph} {name}"
        yield from logits_cases("model", label, key, got, want.numpy(), margin, router)
