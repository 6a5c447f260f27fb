"""量化之后实际是多少：还原出来与原来的差多少，整个 initializer 怎么拆回检查点的一个个张量。"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deepseek_export.checkpoint.recipe import Recipe, calibrated_rows, deinterleaved, materialize
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.checkpoint.weight_only import QuantError, dequantized

#: 不分块：一次一个来源。
_WHOLE = 1 << 62


def quantization_error(name: str, recipe: Recipe, store: TensorStore) -> QuantError:
    """``codes``、``rows`` 配方量化掉了多少；逐块读，参数、错误同 :func:`materialize`。"""
    assert recipe.of is not None
    assert recipe.form is not None
    error = norm = largest = 0.0
    for rows, restored in _both(name, recipe, store):
        gap = restored - rows
        error += float(np.square(gap, dtype=np.float64).sum())
        norm += float(np.square(rows, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    return QuantError(relative=math.sqrt(error / norm) if norm else 0.0, max_abs=largest)


def _both(name: str, recipe: Recipe, store: TensorStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """量化之前与还原之后的几行，float32；校准得来的一次读一个来源，三处的行才对得上。"""
    assert recipe.of is not None
    assert recipe.form is not None
    if not recipe.calibrated:
        for rows in materialize(name, recipe.of, store):
            wide = rows.astype(np.float32, copy=False)
            yield wide, dequantized(wide, recipe.form)
        return
    parts = (recipe.of, calibrated_rows(recipe, "codes"), calibrated_rows(recipe, "scales"))
    for rows, steps, scales in zip(*(materialize(name, one, store, _WHOLE) for one in parts), strict=True):
        factors = np.repeat(scales.astype(np.float32), recipe.form.block, axis=-1)[..., : rows.shape[-1]]
        yield rows.astype(np.float32, copy=False), steps * factors


def separated(recipe: Recipe, rows: np.ndarray) -> dict[str, np.ndarray]:
    """:func:`materialize` 里叠放、交错、重排的逆：整个 initializer → 每个来源的样子。

    Args:
        recipe: 浮点的配方，不是 ``codes`` 之类。
        rows: 形状同 ``recipe.shape``。
    """
    if recipe.op == "stack_swiglu":
        pairs = [half for expert in rows for half in (expert[0::2], expert[1::2])]
        return dict(zip(recipe.sources, pairs, strict=True))
    if recipe.op == "stack":
        return dict(zip(recipe.sources, rows, strict=True))
    if recipe.groups is not None:
        order = deinterleaved(np.arange(len(rows))[:, None], *recipe.groups)[:, 0]
        back = np.empty_like(rows)
        back[order] = rows
        rows = back
    return {recipe.sources[0]: rows}
