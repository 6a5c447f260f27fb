"""已发布的 4 位权重照原来的码写成 dsx 的码，不重新量化。

对称的是 int4：同样的 4 位，同样的 scale。有零点的（AWQ、GPTQ 的 sym=false）在 ``ort-cpu`` 上也是同样的 4 位，零点每块 4 位另存
（``dsx::Int4AffineLinear``、``dsx::Int4AffineExperts``）；TensorRT 的 int4 没有地方放零点，而码减去零点在 -16 到 15 之间，int8 放得下，
所以精确地写成 int8，大一倍。scale 换成算子要的 dtype：放得下的（float16 的总是，bfloat16 的不小于 2^-17 的总是）一位不差，
放不下的舍入，由 :func:`rounding` 算出差多少；超出范围的拒绝。
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepseek_export.checkpoint.int4_config import Int4Layout
from deepseek_export.checkpoint.int4_weights import Int4Weight
from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError

#: 权重、格式、[start, stop) 行 → 配方的那几行。
Part = Callable[[Int4Weight, BlockFormat, int, int], np.ndarray]


def keeps_codes(layout: Int4Layout | None, form: BlockFormat) -> bool:
    """照原来的码写得出来吗：组依次排列，是块的倍数，码放得下。"""
    if layout is None or layout.act_order or layout.group % form.block:
        return False
    return form.kind == "int8" or layout.symmetric or form.zeros


def with_zeros(layout: Int4Layout | None, form: BlockFormat) -> BlockFormat:
    """``form``，来源的码有零点而照写成 int4 时带上零点；只用于放得下零点的算子。"""
    affine = form.model_copy(update={"zeros": True})
    asymmetric = layout is not None and not layout.symmetric and form.kind == "int4"
    return affine if asymmetric and keeps_codes(layout, affine) else form


def kept_scales(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> np.ndarray:
    """[行, K/block]，dtype 是 ``form.scale``；一组里的几块相同。

    Raises:
        DsxError: ``DSX-E116``，scale 超出 ``form.scale`` 的范围。
    """
    scales = weight.scales[start:stop]
    with np.errstate(over="ignore"):
        kept = scales.astype(np.float32).astype(DTYPES[form.scale].numpy)
    if not np.isfinite(kept.astype(np.float32)).all():
        largest = float(np.abs(scales.astype(np.float32)).max())
        raise DsxError(
            "DSX-E116",
            f"{weight.weight} 有 {largest:.4g} 的 scale，超出 {form.scale} 的范围",
            "用 --keep 让它保持浮点；TensorRT 的目标用 --dtype bfloat16",
        )
    return np.repeat(kept, weight.layout.group // form.block, axis=-1)


def kept_codes(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> np.ndarray:
    """[行, K/block, block*bits/8] uint8，无符号的写法。"""
    if form.zeros:
        codes = weight.codes(start, stop)
    else:
        codes = (weight.steps(start, stop).astype(np.int16) + form.zero).astype(np.uint8)
    codes = codes.reshape(stop - start, -1, form.block)
    return codes if form.bits == 8 else _paired(codes)


def kept_zeros(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> np.ndarray:
    """[行, ceil(K/block/2)] uint8，每块一个 4 位的零点，低位在前；一组里的几块相同。"""
    zeros = np.repeat(weight.zeros[start:stop].astype(np.uint8), weight.layout.group // form.block, axis=-1)
    return _paired(np.pad(zeros, ((0, 0), (0, zeros.shape[-1] % 2))))


def _paired(nibbles: np.ndarray) -> np.ndarray:
    """相邻两个 4 位数一字节，低位在前。"""
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def kept_signed_codes(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> np.ndarray:
    """[行, K*bits/8] uint8，有符号的写法的字节。"""
    codes = kept_codes(weight, form, start, stop) ^ np.uint8(0x80 if form.bits == 8 else 0x88)
    return codes.reshape(stop - start, -1)


def kept_rows(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> np.ndarray:
    """[行, K + 2*K/block] int8：有符号的码，再是 float16 的 scale 的字节。"""
    codes = kept_signed_codes(weight, form, start, stop)
    scales = kept_scales(weight, form, start, stop).view(np.uint8)
    return np.concatenate([codes, scales], axis=-1).view(np.int8)


def exact_scales(weight: Int4Weight, form: BlockFormat) -> bool:
    """换了 dtype 的 scale 与原来的逐个相等：权重也就一位不差，不必读码。"""
    kept = weight.scales.astype(np.float32).astype(DTYPES[form.scale].numpy).astype(np.float32)
    return np.array_equal(kept, weight.scales.astype(np.float32))


def rounding(weight: Int4Weight, form: BlockFormat, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """[行, K] float32 的原权重，与 scale 换了 dtype 之后的；放得下时两者逐位相同。"""
    steps = weight.steps(start, stop).reshape(stop - start, -1, form.block).astype(np.float32)
    scales = kept_scales(weight, form, start, stop).astype(np.float32)
    return weight.values(start, stop), (steps * scales[..., None]).reshape(stop - start, -1)
