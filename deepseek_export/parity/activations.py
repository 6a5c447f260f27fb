"""参考模型的激活有多大：float16 只到 65504，权重放得下的模型，激活也可以溢出（DeepSeek-V2 就是）。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_export.parity.report import ActivationRange
from deepseek_export.reference import ReferenceModel

#: float16 最大的有限数。
FLOAT16_MAX = 65504.0


@torch.no_grad()
def activation_range(model: ReferenceModel, rows: Sequence[Sequence[int]], source: str) -> ActivationRange:
    """逐条走一遍模型，看每个模块的每个 float16 输出。

    Args:
        model: float16 的参考模型；按它自己的 dtype 算，溢出的就真的溢出。
        rows: 各条 token。
        source: 这些 token 从哪里来，写进报告。

    Returns:
        绝对值最大的激活与它在哪个模块；有 inf 或 NaN 的，是头一个这样的模块。
    """
    largest, where, overflowed = 0.0, "", False

    def look(name: str, output: Any) -> None:
        nonlocal largest, where, overflowed
        if overflowed:  # 下游的都是它带出来的
            return
        for tensor in _float16(output):
            if not bool(tensor.isfinite().all()):
                where, overflowed = name, True
                return
            found = float(tensor.abs().max())
            if found > largest:
                largest, where = found, name

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in _modules(model)
    ]
    try:
        for row in rows:
            ids = torch.tensor([list(row)])
            past = torch.zeros(1, dtype=torch.int64)
            model(ids, past, torch.tensor([[len(row) - 1]]), model.empty_caches(1, len(row)))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(map(len, rows))
    return ActivationRange(
        largest=None if overflowed else largest,
        where=where,
        limit=FLOAT16_MAX,
        tokens=tokens,
        source=source,
    )


def _modules(model: ReferenceModel) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name)


def _float16(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.dtype == torch.float16 and output.numel():
            yield output
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from _float16(one)
