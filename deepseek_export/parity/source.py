"""校验与比较共用的准备：对照的检查点、随机输入、环境。"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.errors import DsxError

_ROWS, _TOKENS = 2, 25


def open_source(bundle: Bundle, against: Path | str | None) -> Checkpoint:
    """打开对照的检查点；缺省取 manifest 里记的出处。

    Raises:
        DsxError: ``DSX-E601`` 找不到；``DSX-E602`` 与导出时不是同一个。
    """
    source = bundle.manifest.source
    path = Path(against) if against is not None else Path(source.path)
    if not path.is_dir():
        raise DsxError(
            "DSX-E601",
            f"检查点 {path} 不存在（manifest 记的出处是 {source.path}）",
            "用 --against 指定检查点目录",
        )
    checkpoint = Checkpoint.open(path)
    if checkpoint.config != bundle.manifest.model or checkpoint.store.fingerprint() != source.fingerprint:
        raise DsxError(
            "DSX-E602",
            f"{path} 与导出时的检查点不是同一个（config、文件头或权重不同）",
            "给对检查点，或重新导出",
        )
    return checkpoint


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
