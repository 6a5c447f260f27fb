"""各个层级怎么比：一级一个文件，都是 ``run(check, context)``，给出一条条 :class:`~deepseek_export.parity.report.Case`。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from deepseek_export.parity.checks import Check, Level
from deepseek_export.parity.context import Context
from deepseek_export.parity.levels import activations, block, loss, model, op, tokens
from deepseek_export.parity.report import Case

RUN: Mapping[Level, Callable[[Check, Context], Iterator[Case]]] = MappingProxyType(
    {
        "activations": activations.run,
        "op": op.run,
        "block": block.run,
        "model": model.run,
        "tokens": tokens.run,
        "loss": loss.run,
    }
)
