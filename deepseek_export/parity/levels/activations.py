"""activations 层：float16 的 bundle，激活放不放得进 float16。看的是参考模型，用 prompt 的文本，给了 ``--text`` 再加上它。"""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_export.parity.activations import activation_range
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.report import Case

_WINDOW = 512


def run(check: Check, context: Context) -> Iterator[Case]:
    """一项：最大的激活；数字另记在 ``context.activations``。"""
    rows = list(context.rows)
    source = "随机的 token" if context.tokenizer is None else "prompt"
    if context.passage is not None:
        name, ids = context.passage
        window = min(_WINDOW, context.manifest.model.max_position_embeddings)
        rows += [ids[start : start + window] for start in range(0, len(ids), window)]
        source += f" 与 {name}"
    with context.step("激活"):
        found = activation_range(context.model, rows, source)
    context.activations = found
    yield Case(level="activations", name="激活放得进 float16", passed=found.fits, note=found.sentence)
