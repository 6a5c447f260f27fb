"""随机权重的 4 位检查点（compressed-tensors，对称），与 Kimi-K2-Thinking 发布的一样；给 ``checkpoint/synthetic.py`` 用。"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from deepseek_export.checkpoint.int4_config import Int4Config
from deepseek_export.checkpoint.int4_tensors import linear_weights
from deepseek_export.checkpoint.int4_weights import WEIGHT, stored_parts
from deepseek_export.dtypes import BY_SAFETENSORS, DTYPES

#: 0 到 15 均匀的码减 8 之后的标准差。
_SPREAD = 4.64

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def packed_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: Int4Config | None, dtype: str
) -> dict[str, Tensors]:
    """声明是 4 位的权重 → 它的几个张量：名字 → (safetensors 的 dtype, 形状)。

    Raises:
        ValueError: 不是对称的 compressed-tensors：AWQ、GPTQ 与别的变体这里不造。
    """
    if config is None:
        return {}
    layout = config.layout
    if layout.method != "compressed-tensors" or not layout.symmetric or layout.act_order:
        raise ValueError("造 4 位的检查点只支持 compressed-tensors、对称、没有 actorder 的")
    tags = {".weight_packed": "I32", ".weight_shape": "I64", ".weight_scale": DTYPES[dtype].safetensors}
    found: dict[str, Tensors] = {}
    for name in linear_weights(shapes.items()):
        module = name.removesuffix(WEIGHT)
        if config.declares(module):
            parts = stored_parts(name, shapes[name], layout)
            found[name] = {part: (tags[part.removeprefix(module)], shape) for part, shape in parts.items()}
    return found


def is_shape(name: str) -> bool:
    """4 位权重的形状：不能是零。"""
    return name.endswith(".weight_shape")


def packed_block(
    name: str, tag: str, shape: tuple[int, ...], source: tuple[int, ...], seed: int
) -> np.ndarray:
    """一个张量的内容：随机的码、使权重保方差的 scale、形状。

    Args:
        name: 张量名。
        tag: safetensors 的 dtype。
        shape: 张量的形状。
        source: 权重的形状 [N, K]。
        seed: 随机种子。
    """
    if is_shape(name):
        return np.array(source, np.int64)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(".weight_packed"):
        return rng.integers(0, 1 << 32, shape, np.uint32).view(np.int32)
    scales = rng.uniform(0.5, 1.5, shape) / (_SPREAD * np.sqrt(source[-1]))
    return scales.astype(BY_SAFETENSORS[tag].numpy)
