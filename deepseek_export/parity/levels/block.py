"""block 层：每个块单独截图执行、与参考模型比。"""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_export.parity.blocks import main_blocks
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.draft import draft_blocks
from deepseek_export.parity.report import Case


def run(check: Check, context: Context) -> Iterator[Case]:
    """一张图的全部块。"""
    manifest, (attention, rest) = context.manifest, check.keys
    if check.graph == manifest.main.file:
        blocks = main_blocks(manifest, context.model, context.block_rows, (attention, rest))
    else:
        blocks = draft_blocks(manifest, context.draft_runs[check.graph], (attention, rest))
    graph = context.graph(check.graph)
    for block in blocks:
        with context.step(block.name):
            values = [output.value for output in block.outputs]
            got = graph.run(block.feeds, values)
        yield from block.cases(dict(zip(values, got, strict=True)))
