"""FP8 分块的权重还原成 float32。"""

from __future__ import annotations

import numpy as np

from deepseek_export.checkpoint.quantization import FP8_DTYPE, SCALE_SUFFIX
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.dtypes import BY_SAFETENSORS

#: E4M3 的 256 个码各是多少；查表比逐个转换快得多。
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(BY_SAFETENSORS[FP8_DTYPE].numpy).astype(np.float32)


def fp8_values(
    source: str, start: int, stop: int, block_size: tuple[int, int], store: TensorStore
) -> np.ndarray:
    """FP8 矩阵的 ``[start, stop)`` 行 → float32；``start`` 在块的边界上，右边与下边的块可以不满。"""
    height, width = block_size
    values = E4M3_VALUES[store.read_rows(source, start, stop).view(np.uint8)]
    scales = store.read_rows(source + SCALE_SUFFIX, start // height, -(-stop // height))
    with np.errstate(over="ignore", invalid="ignore"):  # 溢出与 NaN 由调用方点名
        for index, row in enumerate(scales):
            values[index * height : (index + 1) * height] *= np.repeat(row, width)[: values.shape[1]]
    return values
