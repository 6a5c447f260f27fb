"""量化之后实际是多少：还原出来与原来的差多少，整个 initializer 怎么拆回检查点的一个个张量。"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deepseek_export.checkpoint.int4_codes import exact_scales, keeps_codes, rounding
from deepseek_export.checkpoint.int4_weights import Int4Weight
from deepseek_export.checkpoint.recipe import (
    CHUNK_BYTES,
    Recipe,
    calibrated_name,
    chunks,
    deinterleaved,
    materialize,
    reader,
)
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.checkpoint.weight_only import BlockFormat, QuantError, dequantized


def quantization_error(name: str, recipe: Recipe, store: TensorStore) -> QuantError:
    """``codes``、``rows`` 配方量化掉了多少；逐块读，照原来的码、scale 也放得下的不读码。参数、错误同 :func:`materialize`。"""
    assert recipe.of is not None
    assert recipe.form is not None
    layout, form = recipe.of.int4, recipe.form
    if layout is not None and keeps_codes(layout, form):
        weights = (Int4Weight(source, layout, store) for source in recipe.sources)
        if all(exact_scales(weight, form) for weight in weights):
            return QuantError(relative=0.0, max_abs=0.0)
    error = norm = largest = 0.0
    for rows, kept in _before_and_after(name, recipe, store):
        gap = kept - rows
        error += float(np.square(gap, dtype=np.float64).sum())
        norm += float(np.square(rows, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    return QuantError(relative=math.sqrt(error / norm) if norm else 0.0, max_abs=largest)


def _before_and_after(
    name: str, recipe: Recipe, store: TensorStore
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """逐块的（量化之前的权重，之后的权重），float32。"""
    assert recipe.of is not None
    assert recipe.form is not None
    if recipe.of.int4 is not None and keeps_codes(recipe.of.int4, recipe.form):
        for source in recipe.sources:
            weight = Int4Weight(source, recipe.of.int4, store)
            for start, stop in chunks(weight.shape, recipe.of, CHUNK_BYTES):
                yield rounding(weight, recipe.form, start, stop)
        return
    if recipe.calibrated:
        for source in recipe.sources:
            shape, read = reader(source, recipe.of, store)
            for start, stop in chunks(shape, recipe.of, CHUNK_BYTES):
                kept = calibrated_values(source, recipe.form, store, start, stop)
                yield read(start, stop).astype(np.float32, copy=False), kept
        return
    for rows in materialize(name, recipe.of, store):
        rows = rows.astype(np.float32, copy=False)
        yield rows, dequantized(rows, recipe.form)


def calibrated_values(
    source: str, form: BlockFormat, store: TensorStore, start: int, stop: int
) -> np.ndarray:
    """校准得来的码还原成权重，``[start, stop)`` 行，float32。"""
    steps = store.read_rows(calibrated_name(source, "codes"), start, stop)
    scales = store.read_rows(calibrated_name(source, "scales"), start, stop).astype(np.float32)
    return steps * np.repeat(scales, form.block, axis=-1)[:, : steps.shape[1]]


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
