"""只量化权重：int8 / int4，沿输入维分块，对称，每块一个 float32 的 scale。

布局与 ONNX Runtime 的 ``MatMulNBits``、``QMoE`` 相同：码是无符号的，零点 ``2^(bits-1)`` 不写出来；int4 两个码一字节，低位在前；
最后不满一块的补零。
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

QuantKind = Literal["int8", "int4"]
QuantBlock = Literal[32, 64, 128]


class BlockFormat(BaseModel):
    """一种分块量化的格式。

    Attributes:
        kind: ``int8`` 或 ``int4``。
        block: 每多少个输入维共用一个 scale。
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: QuantKind
    block: QuantBlock = 32

    @property
    def bits(self) -> int:
        """每个权重的位数。"""
        return 8 if self.kind == "int8" else 4

    @property
    def zero(self) -> int:
        """零点：码减去它再乘 scale。"""
        return 1 << (self.bits - 1)


class Quantization(BlockFormat):
    """一次导出怎么量化。

    Attributes:
        keep: 保持浮点的权重，见 :meth:`keeps`；router、norm 与词嵌入总是浮点，不必写。
    """

    keep: tuple[str, ...] = ()

    @property
    def format(self) -> BlockFormat:
        """不带 ``keep`` 的格式，写进配方。"""
        return BlockFormat(kind=self.kind, block=self.block)

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


def block_scales(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] float32 → [..., ceil(K/block)] float32：每块的最大绝对值除以最大的码；全零的块是 0。"""
    return np.abs(_blocks(weights, form.block)).max(-1) / np.float32(form.zero - 1)


def block_codes(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """[..., K] float32 → [..., ceil(K/block), block*bits/8] uint8。"""
    blocks, scales = _blocks(weights, form.block), block_scales(weights, form)[..., None]
    steps = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)
    codes = (np.rint(steps) + form.zero).astype(np.uint8)
    return codes if form.bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantized(weights: np.ndarray, form: BlockFormat) -> np.ndarray:
    """量化再还原：运行时实际用的权重，形状同 ``weights``。"""
    codes, scales = block_codes(weights, form), block_scales(weights, form)
    if form.bits == 4:
        codes = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    values = (codes.astype(np.float32) - form.zero) * scales[..., None]
    return values.reshape(*weights.shape[:-1], -1)[..., : weights.shape[-1]]


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    """[..., K] → [..., ceil(K/block), block]，末尾补零。"""
    short = -weights.shape[-1] % block
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, short)]) if short else weights
    return padded.reshape(*weights.shape[:-1], -1, block)


def _contains(path: str, pattern: str) -> bool:
    return f".{pattern}." in f".{path}."
