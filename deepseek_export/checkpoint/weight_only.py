"""只量化权重：int8 / int4，沿输入维分块，对称，每块一个 scale。

码有两种写法，值相同：无符号的（``MatMulNBits``、``QMoE``），零点 ``2^(bits-1)`` 不写出来，最后不满一块的补零；有符号的
（``DequantizeLinear``），没有零点。int4 都是两个码一字节，低位在前。只有已发布的 4 位权重会另有逐块的零点，见
:mod:`~deepseek_export.checkpoint.int4_codes`。

scale 逐块在几个候选里取平方误差最小的，候选见 :data:`_SHRINK`；超出码的范围的就截断。scale 先舍入到它的 dtype，码再按舍入之后的取；
float16 的 scale 小于 2^-25 时是 0，那一块也就是 0。
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict

from deepseek_export.dtypes import DTYPES

QuantKind = Literal["int8", "int4"]
QuantBlock = Literal[32, 64, 128]
ScaleDtype = Literal["float32", "float16", "bfloat16"]
#: dsx 自己的算子（``dsx::Int8Linear`` 等）的 scale：块 32 的 int4 用它少读一成，而码按舍入之后的 scale 取，误差几乎不变。
KERNEL_SCALE: ScaleDtype = "float16"

#: 候选的 scale 是「块里最大的绝对值 / 最大的码」的几倍。int8 的第二个让绝对值最大的负数用上 -128；int4 的步长粗，缩小步长、截断
#: 一两个大的往往更准：演示检查点每 32 个一块，权重的相对误差从 9.7e-2 降到 8.7e-2，候选再多几乎没有好处。
_SHRINK: dict[QuantKind, tuple[float, ...]] = {"int8": (1.0, 127 / 128), "int4": (1.0, 0.95, 0.9, 0.85, 0.8)}


class Blocks(BaseModel):
    """怎么分块量化。

    Attributes:
        kind: ``int8`` 或 ``int4``。
        block: 每多少个输入维共用一个 scale。
        scale: scale 的 dtype：TensorRT 与模型的相同，``ort-cpu`` 是 :data:`KERNEL_SCALE`。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: QuantKind
    block: QuantBlock = 32
    scale: ScaleDtype = "float32"

    @property
    def bits(self) -> int:
        """每个权重的位数。"""
        return 8 if self.kind == "int8" else 4

    @property
    def zero(self) -> int:
        """零点：码减去它再乘 scale。"""
        return 1 << (self.bits - 1)


class BlockFormat(Blocks):
    """一个权重量化的格式。

    Attributes:
        zeros: 零点逐块给出，另存一个张量；只有照发布的码写成 int4、而那些码有零点的。
    """

    zeros: bool = False


class Quantization(Blocks):
    """一次导出怎么量化。

    Attributes:
        keep: 保持浮点的权重，见 :meth:`keeps`；router、norm 总是浮点，不必写。
    """

    keep: tuple[str, ...] = ()

    def format(self, scale: ScaleDtype) -> BlockFormat:
        """不带 ``keep`` 的格式，写进配方。"""
        return BlockFormat(kind=self.kind, block=self.block, scale=scale)

    def keeps(self, *paths: str) -> bool:
        """``keep`` 里有没有哪一项是某个路径的一段：``lm_head``、``o_proj``、``layers.3.mlp`` 都按点分的整段匹配。"""
        return any(_contains(path, pattern) for path in paths for pattern in self.keep)

    def unmatched(self, paths: list[str]) -> list[str]:
        """``keep`` 里什么也没匹配到的项。"""
        return [pattern for pattern in self.keep if not any(_contains(path, pattern) for path in paths)]


class QuantError(BaseModel):
    """一个张量量化之后偏了多少。

    Attributes:
        relative: 误差的范数除以原权重的范数。
        max_abs: 最大绝对误差。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    relative: float
    max_abs: float


def largest_weight(form: BlockFormat) -> float:
    """绝对值至多这么大的权重，scale 才在它的 dtype 的范围里；先核对它再量化。"""
    return float(ml_dtypes.finfo(DTYPES[form.scale].numpy).max) * (form.zero - 1)


def block_scales(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] → [..., ceil(K/block)]，dtype 是 ``form.scale``；全零的块是 0。"""
    blocks = _blocks(weights, form.block)
    largest = np.abs(blocks).max(-1) / np.float32(form.zero - 1)
    best = np.zeros_like(largest)
    least = np.full_like(largest, np.inf)
    for shrink in _SHRINK[form.kind]:
        scales = (largest * np.float32(shrink)).astype(DTYPES[form.scale].numpy).astype(np.float32)
        gap = _steps(blocks, scales, form)
        gap *= scales[..., None]
        gap -= blocks
        error = np.einsum("...i,...i->...", gap, gap)
        best = np.where(error < least, scales, best)
        least = np.minimum(error, least)
    return best.astype(DTYPES[form.scale].numpy)


def block_codes(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] → [..., ceil(K/block), block*bits/8] uint8，无符号的写法。"""
    scales = block_scales(weights, form).astype(np.float32)
    codes = (_steps(_blocks(weights, form.block), scales, form) + np.float32(form.zero)).astype(np.uint8)
    return codes if form.bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def block_steps(weights: np.ndarray, scales: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] 与它的 scale → [..., K] int8，最近的码，有符号。"""
    steps = _steps(_blocks(weights, form.block), scales.astype(np.float32), form)
    return steps.reshape(*weights.shape[:-1], -1)[..., : weights.shape[-1]].astype(np.int8)


def stored_codes(steps: np.ndarray, form: BlockFormat, signed: bool) -> np.ndarray:
    """:func:`block_steps` 那样的码 → 存储的字节，写法同 :func:`block_codes`、:func:`signed_codes`。"""
    short = -steps.shape[-1] % form.block
    padded = np.pad(steps, [(0, 0)] * (steps.ndim - 1) + [(0, short)]).view(np.uint8)
    wide = padded if signed else padded + np.uint8(form.zero)
    codes = (wide[..., ::2] & 0xF) | (wide[..., 1::2] << 4) if form.bits == 4 else wide
    return codes if signed else codes.reshape(*steps.shape[:-1], -1, form.block * form.bits // 8)


def loaded_steps(codes: np.ndarray, form: BlockFormat, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    """:func:`stored_codes` 的逆：存储的字节 → ``shape`` 的 int8。"""
    stored = codes.reshape(-1).view(np.uint8)
    codes = np.stack([stored & 0xF, stored >> 4], axis=-1) if form.bits == 4 else stored
    wide = codes.reshape(*shape[:-1], -1)[..., : shape[-1]].astype(np.int16)
    half = 2 * form.zero
    return (((wide + form.zero) % half - form.zero) if signed else wide - form.zero).astype(np.int8)


def signed_codes(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] → [..., K*bits/8] uint8，有符号的写法的字节；K 是 block 的倍数。"""
    codes = block_codes(weights, form) ^ np.uint8(0x80 if form.bits == 8 else 0x88)
    return codes.reshape(*weights.shape[:-1], -1)


def packed_rows(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] → [..., K + 2*K/block] int8：有符号的码，再是 float16 的 scale 的字节；K 是 block 的倍数。"""
    codes, scales = signed_codes(weights, form), block_scales(weights, form)
    return np.concatenate([codes, scales.view(np.uint8)], axis=-1).view(np.int8)


def dequantized(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """量化再还原：运行时实际用的权重，形状、dtype 同 ``weights``；码乘 scale 在 float32 里没有误差，只在最后舍入一次。"""
    scales = block_scales(weights, form).astype(np.float32)
    values = _steps(_blocks(weights, form.block), scales, form) * scales[..., None]
    return values.reshape(*weights.shape[:-1], -1)[..., : weights.shape[-1]].astype(weights.dtype, copy=False)


def unpacked_int4(packed: np.ndarray) -> np.ndarray:
    """[N] uint8，一字节两个有符号的码 → [2N] int4。"""
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)


def packed_int4(values: np.ndarray) -> np.ndarray:
    """:func:`unpacked_int4` 的逆；``values`` 的元素个数是偶数。"""
    nibbles = values.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    return nibbles[::2] | (nibbles[1::2] << 4)


def _steps(blocks: np.ndarray, scales: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., 块数, block] float32，每个权重舍入到的码（有符号），scale 是 0 的块全是 0。"""
    scales = scales[..., None]
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    return np.clip(np.rint(steps, out=steps), -form.zero, form.zero - 1, out=steps)


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    """[..., K] → [..., ceil(K/block), block] float32，末尾补零。"""
    weights = weights.astype(np.float32, copy=False)
    short = -weights.shape[-1] % block
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, short)]) if short else weights
    return padded.reshape(*weights.shape[:-1], -1, block)


def _contains(path: str, pattern: str) -> bool:
    return f".{pattern}." in f".{path}."
