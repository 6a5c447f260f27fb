"""自包含的权重文件：一个标准的 safetensors，ONNX 的 external data 直接指进它的偏移。

逐块写出：峰值内存由检查点里最大的单个张量决定。文件用 safetensors 库也能打开，便于核对。
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_export.bundle.disk import disk_errors
from deepseek_export.checkpoint.recipe import Recipe, materialize
from deepseek_export.checkpoint.store import TensorStore
from deepseek_export.progress import Progress

_TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """一个 initializer 在权重文件里的位置（字节）。"""

    offset: int
    length: int


def write_packed(
    path: Path, recipes: Mapping[str, Recipe], store: TensorStore, progress: Progress
) -> dict[str, Slot]:
    """按配方写权重文件。

    Args:
        path: 目标文件。
        recipes: initializer 名 → 配方；按此次序写。
        store: 检查点张量。
        progress: 以字节计的进度。

    Returns:
        initializer 名 → 在文件里的位置。

    Raises:
        DsxError: ``DSX-E115`` / ``DSX-E116`` 权重有问题；``DSX-E404`` 磁盘写满。
    """
    header: dict[str, dict] = {}
    start = 0
    for name, recipe in recipes.items():
        end = start + recipe.nbytes
        header[name] = {
            "dtype": _TAGS[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [start, end],
        }
        start = end
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-(8 + len(blob)) % _ALIGNMENT)  # 规范允许头部以空格结尾；数据区从 64 字节边界开始
    base = 8 + len(blob)
    progress.start("写权重", start, "bytes")
    with disk_errors(path), path.open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for name, recipe in recipes.items():
            for chunk in materialize(name, recipe, store):
                file.write(chunk.reshape(-1).view(np.uint8).data)
                progress.advance(chunk.nbytes, name)
        assert file.tell() == base + start
    return {
        name: Slot(base + entry["data_offsets"][0], recipes[name].nbytes) for name, entry in header.items()
    }
