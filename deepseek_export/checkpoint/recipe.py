"""权重配方：每个 ONNX initializer 由检查点里的哪些张量、经过什么变换得到。

initializer 的名字就是检查点里的名字；叠在一起的专家用 ``*`` 代表编号
（``model.layers.3.mlp.experts.*.gate_proj.weight``）。配方写进 manifest，由 :func:`materialize` 逐块执行：
每次只读来源的几行，峰值内存由块的大小决定，与张量、模型的大小无关。
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, field_serializer, field_validator

from deepseek_export.checkpoint import weight_only
from deepseek_export.checkpoint.checkpoint import expected_mtp_tensors, expected_tensors
from deepseek_export.checkpoint.config import ModelConfig
from deepseek_export.checkpoint.fp8 import fp8_values
from deepseek_export.checkpoint.int4_codes import (
    Part,
    keeps_codes,
    kept_codes,
    kept_rows,
    kept_scales,
    kept_signed_codes,
    kept_zeros,
)
from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.int4_weights import Int4Weight, weight_shape
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    block_codes,
    block_scales,
    dequantized,
    largest_weight,
    signed_codes,
    stored_codes,
    unpacked_int4,
)
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError

WeightDtype = Literal["float32", "float16", "bfloat16"]
InitializerDtype = Literal["float32", "float16", "bfloat16", "uint8", "int8", "int4"]

#: 一次读进内存的来源数据，按 float32 计的字节数。
CHUNK_BYTES = 64 << 20

#: router 的权重与 bias 始终 float32（transformers 的 ``_keep_in_fp32_modules_strict``）；索引器各头的权重也是（transformers 只在
#: float16 时如此，bfloat16 时不转；它决定选哪些 key，量很小，这里总是 float32）。
_FLOAT32_SUFFIXES = (
    "mlp.gate.weight",
    "mlp.gate.e_score_correction_bias",
    "self_attn.indexer.weights_proj.weight",
)


class Recipe(BaseModel):
    """一个 initializer 的来历。

    Attributes:
        op: ``copy`` 原样（可改 dtype）；``stack`` 在新的第 0 维叠放；``stack_swiglu`` 来源按 gate、up 交替给出，每个专家内
            gate 行与 up 行交错（``[E, 2I, D]``，ONNX Runtime ``MoE`` 的 ``swiglu_fusion=1``）；``deinterleave`` 按 ``groups``
            重排行；``zeros`` 全零；
            ``codes``、``scales`` 是 ``of`` 按 ``form`` 量化之后的码与 scale；码的 dtype 是 ``uint8`` 则是无符号的写法，是
            ``int8``、``int4`` 则是有符号的；``zero_points`` 是照写的码的零点；``rows`` 是一行的码与 scale 放在一起，见 :mod:`deepseek_export.ops.weight_rows`。
        sources: 检查点张量名。写成 JSON 时，编号连续的专家折成一个：``…experts.{0..255}.gate_proj.weight``、
            ``…experts.{0..255}.{gate_proj,up_proj}.weight``，含义同 shell 的花括号。
        shape: initializer 的形状。
        dtype: initializer 的 dtype；来源是 FP8 而它是 int8，又没有 ``of``，就是码的字节原样。
        groups: （每组行数，组末几行）：每组最后那几行由成对 (x0, x1) 改成前后两半，只有 ``deinterleave`` 有。
        block_size: 来源是 FP8 时每个 scale 管的块（行、列），先按 ``来源名_scale_inv`` 反量化；``None`` 表示来源不是 FP8。
        int4: 来源是 4 位时怎么排，先还原；``None`` 表示来源不是 4 位。
        of: 量化之前的配方，只有 ``codes``、``scales``、``zero_points``、``rows`` 有。
        form: 量化的格式，有 ``of`` 的才有。
        calibrated: 码与 scale 是校准得来的，不能由检查点一步算出：导出时读 :func:`calibrated_name` 的张量，之后在 bundle 的权重文件里。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Literal[
        "copy", "stack", "stack_swiglu", "deinterleave", "zeros", "codes", "scales", "zero_points", "rows"
    ]
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: InitializerDtype
    groups: tuple[int, int] | None = None
    block_size: tuple[int, int] | None = None
    int4: Int4Layout | None = None
    of: Recipe | None = None
    form: BlockFormat | None = None
    calibrated: bool = False

    @field_serializer("sources")
    def _folded(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        return _fold(sources)

    @field_validator("sources", mode="before")
    @classmethod
    def _unfolded(cls, value: Any) -> Any:
        return _unfold(value) if isinstance(value, list | tuple) else value

    @property
    def keeps_bytes(self) -> bool:
        """来源是 FP8，字节原样，不还原。"""
        return self.dtype == "int8" and self.of is None

    @property
    def nbytes(self) -> int:
        """字节数；int4 两个一字节，个数总是偶数。"""
        return DTYPES[self.dtype].nbytes(math.prod(self.shape))


_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(\w+)(\..*)")
_FOLDED = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}\.(?:\{([\w,]+)\}|(\w+))(\..*)")
_MAX_EXPERTS = 1 << 16


def _fold(sources: tuple[str, ...]) -> tuple[str, ...]:
    """编号连续的专家折成一个模式；折不了就原样。"""
    parts = [match.groups() for source in sources if (match := _EXPERT.fullmatch(source))]
    if len(parts) < 2 or len(parts) != len(sources):
        return sources
    head, first, _, tail = parts[0]
    kinds = ",".join(dict.fromkeys(part[2] for part in parts))
    folded = (f"{head}{{{first}..{parts[-1][1]}}}.{f'{{{kinds}}}' if ',' in kinds else kinds}{tail}",)
    return folded if _unfold(folded) == sources else sources


def _unfold(sources: Iterable[Any]) -> tuple[Any, ...]:
    """:func:`_fold` 的逆。"""
    names: list[Any] = []
    for source in sources:
        if not (match := _FOLDED.fullmatch(source) if isinstance(source, str) else None):
            names.append(source)
            continue
        head, first, last, kinds, kind, tail = match.groups()
        if int(last) - int(first) >= _MAX_EXPERTS:
            raise ValueError(f"{source} 展开后太长")
        for expert in range(int(first), int(last) + 1):
            names += [f"{head}{expert}.{name}{tail}" for name in (kinds or kind).split(",")]
    return tuple(names)


def quantized_recipes(recipe: Recipe, form: BlockFormat, signed: bool = False) -> tuple[Recipe, Recipe]:
    """一个浮点权重 → 码与 scale 的配方，[..., K] 的 scale 是 [..., 块数]。

    Args:
        recipe: 量化之前的权重。
        form: 格式。
        signed: 码写成 [..., K] 的 int8 / int4（K 要是 block 的倍数），否则是 [..., 块数, 每块字节数] 的 uint8。
    """
    *rows, width = recipe.shape
    blocks = -(-width // form.block)

    def part(op: Literal["codes", "scales"], shape: tuple[int, ...], dtype: InitializerDtype) -> Recipe:
        return Recipe(op=op, sources=recipe.sources, shape=shape, dtype=dtype, of=recipe, form=form)

    if signed:
        codes = part("codes", recipe.shape, form.kind)
    else:
        codes = part("codes", (*rows, blocks, form.block * form.bits // 8), "uint8")
    return codes, part("scales", (*rows, blocks), form.scale)


def zero_points(recipe: Recipe, form: BlockFormat) -> Recipe:
    """:func:`quantized_recipes` 的码的零点，[..., ceil(块数/2)]；``form`` 带着零点。"""
    *rows, width = recipe.shape
    shape = (*rows, (width // form.block + 1) // 2)
    return Recipe(op="zero_points", sources=recipe.sources, shape=shape, dtype="uint8", of=recipe, form=form)


def calibrated_name(source: str, part: Literal["codes", "scales"]) -> str:
    """检查点的张量 ``source`` 校准之后的码（[N, K] int8）或 scale（[N, ceil(K/block)]）叫什么。"""
    return f"{source}.calibrated_{part}"


def packed_rows(recipe: Recipe, form: BlockFormat) -> Recipe:
    """一个浮点矩阵 → 码与 scale 放在一起的行；宽度是 block 的倍数，scale 是 float16。"""
    *rows, width = recipe.shape
    shape = (*rows, width + 2 * (width // form.block))
    return Recipe(op="rows", sources=recipe.sources, shape=shape, dtype="int8", of=recipe, form=form)


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
        # V2、A.X-K1 没有 e_score_correction_bias，而 MoeGate 的输入个数固定：补一个零。
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        if config.is_moe_layer(layer) and name not in recipes:
            recipes[name] = Recipe(op="zeros", sources=(), shape=(config.n_routed_experts,), dtype="float32")
    return recipes


def materialize(
    name: str, recipe: Recipe, store: TensorStore, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[np.ndarray]:
    """按行主序逐块产出 initializer 的内容。

    Args:
        name: initializer 名，只用于报错。
        recipe: 配方，已经过 :func:`~deepseek_export.checkpoint.bind.bind_recipes`。
        store: 检查点张量。
        chunk_bytes: 一块的上限，按 float32 计；至少一行（FP8 至少一行块）。

    Yields:
        连续的 ndarray，dtype 为配方的 dtype，有符号的码则是 uint8 的字节；拼起来就是整个 initializer。

    Raises:
        DsxError: ``DSX-E115`` 来源有 NaN/Inf；``DSX-E116`` 转成目标 dtype 时溢出，或 scale 溢出；``DSX-E652`` 4 位的来源
            自相矛盾。
    """
    if recipe.calibrated and recipe.of is not None:
        yield from _arranged(recipe.of, lambda source: _calibrated(source, recipe, store, chunk_bytes))
    elif recipe.of is not None and recipe.form is not None and keeps_codes(recipe.of.int4, recipe.form):
        yield from _arranged(recipe.of, lambda source: _published(source, recipe, store, chunk_bytes))
    elif recipe.of is not None and recipe.form is not None:
        part = _part(recipe)
        for rows in materialize(name, recipe.of, store, chunk_bytes):
            _check_scales(name, rows, recipe.form)
            yield part(rows, recipe.form)
    elif recipe.op == "zeros":
        yield np.zeros(recipe.shape, DTYPES[recipe.dtype].numpy)
    else:
        yield from _arranged(recipe, lambda source: _converted(name, source, recipe, store, chunk_bytes))


def _arranged(recipe: Recipe, pieces: Callable[[str], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """各个来源的几行 → initializer 的几行。"""
    if recipe.op == "stack_swiglu":
        for gate, up in zip(recipe.sources[::2], recipe.sources[1::2], strict=True):
            for pair in zip(pieces(gate), pieces(up), strict=True):
                yield np.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:])
    else:
        for source in recipe.sources:
            for rows in pieces(source):
                yield rows if recipe.groups is None else deinterleaved(rows, *recipe.groups)


def _calibrated(source: str, recipe: Recipe, store: TensorStore, chunk_bytes: int) -> Iterator[np.ndarray]:
    """一个来源，校准得来的码或 scale。"""
    assert recipe.of is not None
    assert recipe.form is not None
    name = calibrated_name(source, "scales" if recipe.op == "scales" else "codes")
    for start, stop in chunks(store[name].shape, recipe.of, chunk_bytes):
        rows = store.read_rows(name, start, stop)
        yield rows if recipe.op == "scales" else stored_codes(rows, recipe.form, recipe.dtype != "uint8")


def _published(source: str, recipe: Recipe, store: TensorStore, chunk_bytes: int) -> Iterator[np.ndarray]:
    """一个 4 位的来源，照原来的码。"""
    assert recipe.of is not None
    assert recipe.of.int4 is not None
    assert recipe.form is not None
    weight, part = Int4Weight(source, recipe.of.int4, store), _kept_part(recipe)
    for start, stop in chunks(weight.shape, recipe.of, chunk_bytes):
        yield part(weight, recipe.form, start, stop)


def _kept_part(recipe: Recipe) -> Part:
    """:func:`_part` 的不重新量化的写法。"""
    if recipe.op == "rows":
        return kept_rows
    if recipe.op == "scales":
        return kept_scales
    if recipe.op == "zero_points":
        return kept_zeros
    return kept_codes if recipe.dtype == "uint8" else kept_signed_codes


def _part(recipe: Recipe) -> Callable[[np.ndarray, BlockFormat], np.ndarray]:
    """浮点的几行 → 这个配方要的那一部分。"""
    if recipe.op == "rows":
        return weight_only.packed_rows
    if recipe.op == "scales":
        return block_scales
    return block_codes if recipe.dtype == "uint8" else signed_codes


def load_quantized(name: str, recipe: Recipe, form: BlockFormat, store: TensorStore) -> np.ndarray:
    """浮点的配方 ``recipe`` 按 ``form`` 量化再还原：量化的 bundle 运行时实际用的权重；错误同 :func:`materialize`。"""
    if not keeps_codes(recipe.int4, form):
        return dequantized(load_array(name, recipe, store), form)
    if form.zeros:
        form = form.model_copy(update={"kind": "int8", "zeros": False})  # 码减去零点，有符号的 4 位放不下
    codes, scales = (load_array(name, part, store) for part in quantized_recipes(recipe, form, signed=True))
    values = codes.astype(np.float32).reshape(*recipe.shape[:-1], -1, form.block)
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(recipe.shape).astype(DTYPES[recipe.dtype].numpy, copy=False)


def load_array(name: str, recipe: Recipe, store: TensorStore) -> np.ndarray:
    """整个 initializer 读进内存；参数、错误同 :func:`materialize`。"""
    raw, start = np.empty(recipe.nbytes, np.uint8), 0
    for chunk in materialize(name, recipe, store):
        raw[start : start + chunk.nbytes] = chunk.reshape(-1).view(np.uint8)
        start += chunk.nbytes
    values = unpacked_int4(raw) if recipe.dtype == "int4" else raw.view(DTYPES[recipe.dtype].numpy)
    return values.reshape(recipe.shape)


def _converted(
    name: str, source: str, recipe: Recipe, store: TensorStore, chunk_bytes: int
) -> Iterator[np.ndarray]:
    """一个来源：逐块读出、反量化、查 NaN、转 dtype。"""
    dtype = DTYPES[recipe.dtype].numpy
    shape, read = reader(source, recipe, store)
    for start, stop in chunks(shape, recipe, chunk_bytes):
        array = read(start, stop)
        finite = np.isfinite(array)
        if not finite.all():
            raise DsxError(
                "DSX-E115",
                f"张量 {_first(source, array, finite, start)}（用于 {name}）",
                "检查点坏了：重新下载，或回到产生它的训练、转换步骤查 NaN",
            )
        if recipe.keeps_bytes:
            yield array.view(dtype)
            continue
        with np.errstate(over="ignore"):
            converted = array.astype(dtype, copy=False)
        if dtype.itemsize < array.dtype.itemsize or (dtype == np.float16 and array.dtype != np.float16):
            finite = np.isfinite(converted)
            if not finite.all():
                what = f"张量 {_first(source, array, finite, start)} 超出 {dtype.name} 的范围"
                raise DsxError("DSX-E116", what, "改用 --dtype float32；TensorRT 的目标用 --dtype bfloat16")
        yield converted


def reader(
    source: str, recipe: Recipe, store: TensorStore
) -> tuple[tuple[int, ...], Callable[[int, int], np.ndarray]]:
    """一个来源还原之后的形状，与读它的 [start, stop) 行的函数。"""
    if recipe.int4 is not None:
        return weight_shape(source, recipe.int4, store), Int4Weight(source, recipe.int4, store).values
    if (block := recipe.block_size) is not None:
        return store[source].shape, lambda start, stop: fp8_values(source, start, stop, block, store)
    return store[source].shape, lambda start, stop: store.read_rows(source, start, stop)


def chunks(shape: tuple[int, ...], recipe: Recipe, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """每块是哪几行：从 FP8 的块、也从一组的边界开始。"""
    rows = max(chunk_bytes // (4 * math.prod(shape[1:]) or 1), 1)
    unit = math.lcm(
        recipe.block_size[0] if recipe.block_size else 1, recipe.groups[0] if recipe.groups else 1
    )
    rows = max(rows // unit, 1) * unit
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _check_scales(name: str, rows: np.ndarray, form: BlockFormat) -> None:
    """每块的 scale 都在它的 dtype 的范围里；码大到装不下的权重不写成无穷。"""
    largest, most = largest_weight(form), float(np.abs(rows).max(initial=0.0))
    if most > largest:
        raise DsxError(
            "DSX-E116",
            f"{name} 有绝对值 {most:.4g} 的权重，{form.kind} 的 scale 超出 {form.scale} 的范围（权重至多 {largest:.4g}）",
            "用 --keep 让它保持浮点，例如 --keep down_proj",
        )


def deinterleaved(array: np.ndarray, rows: int, tail: int) -> np.ndarray:
    """``rows`` 行一组，每组最后 ``tail`` 行由 x0 y0 x1 y1 … 排成 x0 x1 … y0 y1 …。"""
    head = np.arange(rows - tail)
    order = np.concatenate([head, np.arange(rows - tail, rows).reshape(-1, 2).T.ravel()])
    return array.reshape(-1, rows, *array.shape[1:])[:, order].reshape(array.shape)


def _first(source: str, array: np.ndarray, finite: np.ndarray, start: int) -> str:
    """第一个出问题的元素：``名字[坐标] = 值``；坐标是整个张量里的。"""
    row, *rest = (int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
    return f"{source}{[start + row, *rest]} = {array[(row, *rest)]}"
