"""校验与比较共用的准备：随机输入、环境。"""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime
import torch

from deepseek_export.bundle import Manifest

_ROWS, _TOKENS = 2, 25


def block_rows(manifest: Manifest, seed: int) -> list[list[int]]:
    """逐块比较用的等长随机 token 序列。"""
    rng = np.random.default_rng(seed)
    return rng.integers(0, manifest.model.vocab_size, (_ROWS, _TOKENS)).tolist()


def environment() -> dict[str, str]:
    """决定结果的版本，写进报告。"""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
