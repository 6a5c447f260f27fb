"""权重配方：每个 ONNX initializer 由检查点里的哪些张量、经过什么变换得到。

initializer 的名字就是检查点里的名字；叠在一起的专家用 ``*`` 代表编号
（``model.layers.3.mlp.experts.*.gate_proj.weight``）。配方写进 manifest，由 :func:`materialize` 逐块执行：
叠放的专家一次只读一个，峰值内存由最大的单个张量决定，与模型大小无关。
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict

from deepseek_export.checkpoint.checkpoint import expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.config import ModelConfig
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.errors import DsxError

WeightDtype = Literal["float32", "float16", "bfloat16"]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: router 的权重与 bias 始终 float32（transformers 的 ``_keep_in_fp32_modules_strict``）。
_FLOAT32_SUFFIXES = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")


class Recipe(BaseModel):
    """一个 initializer 的来历。

    Attributes:
        op: ``copy`` 原样（可改 dtype）；``stack`` 在新的第 0 维叠放；``stack_swiglu`` 来源按 gate、up 交替给出，每个专家内
            gate 行与 up 行交错（``[E, 2I, D]``，ONNX Runtime ``MoE`` 的 ``swiglu_fusion=1``）；``zeros`` 全零。
        sources: 检查点张量名。
        shape: initializer 的形状。
        dtype: initializer 的 dtype。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Literal["copy", "stack", "stack_swiglu", "zeros"]
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: WeightDtype

    @property
    def nbytes(self) -> int:
        """字节数。"""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


def weight_recipes(config: ModelConfig, dtype: WeightDtype) -> dict[str, Recipe]:
    """主模型全部 initializer 的配方，按层的次序。

    Args:
        config: 模型配置。
        dtype: 模型 dtype；router 的权重不随它变，始终 float32。

    Returns:
        initializer 名 → 配方。每个检查点张量恰好被用一次。
    """
    return _recipes(config, expected_tensors(config), range(config.num_hidden_layers), dtype)


def mtp_recipes(config: ModelConfig, index: int, dtype: WeightDtype) -> dict[str, Recipe]:
    """第 ``index`` 个 MTP 模块的配方；词嵌入与 lm_head 用主模型的那一份，不在其中。"""
    shapes = {
        name: shape
        for name, shape in expected_mtp_tensors(config, index).items()
        if not name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
    }
    return _recipes(config, shapes, (config.num_hidden_layers + index,), dtype)


def _recipes(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], layers: Iterable[int], dtype: WeightDtype
) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    stacks: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        head, found, tail = name.partition(".mlp.experts.")
        if found:
            stacks.setdefault(f"{head}.mlp.experts.*.{tail.partition('.')[2]}", []).append(name)
            continue
        kept = "float32" if name.endswith(_FLOAT32_SUFFIXES) else dtype
        recipes[name] = Recipe(op="copy", sources=(name,), shape=shape, dtype=kept)
    for name, sources in stacks.items():
        shape = (len(sources), *shapes[sources[0]])
        recipes[name] = Recipe(op="stack", sources=tuple(sources), shape=shape, dtype=dtype)
    for layer in layers:
        # V2 没有 e_score_correction_bias，而 MoeGate 的输入个数固定：补一个零。
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        if config.is_moe_layer(layer) and name not in recipes:
            recipes[name] = Recipe(op="zeros", sources=(), shape=(config.n_routed_experts,), dtype="float32")
    return recipes


def materialize(name: str, recipe: Recipe, store: TensorStore) -> Iterator[np.ndarray]:
    """按行主序逐块产出 initializer 的内容。

    Args:
        name: initializer 名，只用于报错。
        recipe: 配方。
        store: 检查点张量。

    Yields:
        连续的 ndarray，dtype 为配方的 dtype；拼起来就是整个 initializer。

    Raises:
        DsxError: ``DSX-E115`` 来源有 NaN/Inf；``DSX-E116`` 转成目标 dtype 时溢出。
    """
    dtype = NUMPY_DTYPES[recipe.dtype]
    if recipe.op == "zeros":
        yield np.zeros(recipe.shape, dtype)
    elif recipe.op == "stack_swiglu":
        for gate, up in zip(recipe.sources[::2], recipe.sources[1::2], strict=True):
            pair = [_converted(name, source, store, dtype) for source in (gate, up)]
            yield np.ascontiguousarray(np.stack(pair, axis=1)).reshape(-1, recipe.shape[-1])
    else:
        for source in recipe.sources:
            yield _converted(name, source, store, dtype)


def load_array(name: str, recipe: Recipe, store: TensorStore) -> np.ndarray:
    """整个 initializer 读进内存；参数、错误同 :func:`materialize`。"""
    out = np.empty(recipe.shape, NUMPY_DTYPES[recipe.dtype])
    flat, start = out.reshape(-1), 0
    for chunk in materialize(name, recipe, store):
        flat[start : start + chunk.size] = chunk.reshape(-1)
        start += chunk.size
    return out


def _converted(name: str, source: str, store: TensorStore, dtype: np.dtype) -> np.ndarray:
    array = store.read(source)
    finite = np.isfinite(array)
    if not finite.all():
        where = np.unravel_index(int(np.argmin(finite)), array.shape)
        raise DsxError(
            "DSX-E115",
            f"张量 {source}{[int(i) for i in where]} = {array[where]}（用于 {name}）",
            "检查点坏了：重新下载，或回到产生它的训练、转换步骤查 NaN",
        )
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(dtype, copy=False))
    if dtype.itemsize < array.dtype.itemsize or (dtype == np.float16 and array.dtype != np.float16):
        finite = np.isfinite(converted)
        if not finite.all():
            where = np.unravel_index(int(np.argmin(finite)), array.shape)
            raise DsxError(
                "DSX-E116",
                f"张量 {source}{[int(i) for i in where]} = {array[where]} 超出 {dtype.name} 的范围",
                "改用 --dtype float32",
            )
    return converted
