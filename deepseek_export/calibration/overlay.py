"""校准出来的码暂放在哪里：一个 safetensors，每个张量一对，导出时与检查点一起读。

码是 [N, K] 的 int8，还没有压成四位：叠放、交错、重排都在行上，与检查点的张量一样做，压成四位是最后一步。
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from deepseek_export.checkpoint.recipe import calibrated_name
from deepseek_export.checkpoint.weight_only import BlockFormat
from deepseek_export.dtypes import DTYPES

Part = Literal["codes", "scales"]


class CodesWriter:
    """按名字写，次序随意；写满才算完。

    Args:
        file: 打开了的文件。
        slots: 名字 → （起点，字节数）。
    """

    def __init__(self, file: BinaryIO, slots: Mapping[str, tuple[int, int]]) -> None:
        self._file, self._left = file, dict(slots)

    @property
    def missing(self) -> list[str]:
        """还没有写的。"""
        return list(self._left)

    def write(self, source: str, steps: Tensor, scales: Tensor) -> None:
        """检查点的张量 ``source`` 的码与 scale；各写一次。"""
        parts: dict[Part, Tensor] = {"codes": steps, "scales": scales}
        for part, values in parts.items():
            start, length = self._left.pop(calibrated_name(source, part))
            raw = values.contiguous().view(torch.uint8).numpy().tobytes()
            assert len(raw) == length, source
            self._file.seek(start)
            self._file.write(raw)


@contextmanager
def codes_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, BlockFormat]
) -> Iterator[CodesWriter]:
    """新建文件，写好文件头；退出时每个都要写过。

    Args:
        path: 文件。
        shapes: 检查点的张量 → [N, K]。
        formats: 张量 → 格式。
    """
    header: dict[str, dict] = {}
    end = 0
    for source, (rows, width) in shapes.items():
        form = formats[source]
        kinds: dict[Part, tuple[str, int]] = {
            "codes": ("int8", width),
            "scales": (form.scale, -(-width // form.block)),
        }
        for part, (dtype, columns) in kinds.items():
            start, end = end, end + DTYPES[dtype].nbytes(rows * columns)
            header[calibrated_name(source, part)] = {
                "dtype": DTYPES[dtype].safetensors,
                "shape": [rows, columns],
                "data_offsets": [start, end],
            }
    blob = json.dumps(header, separators=(",", ":")).encode()
    base = 8 + len(blob)
    with path.open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        slots = {
            name: (base + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
        writer = CodesWriter(file, slots)
        yield writer
        assert not writer.missing, f"没有校准到：{writer.missing[:3]}"


def codes_bytes(shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, BlockFormat]) -> int:
    """这个文件多大，不计文件头。"""
    return sum(
        rows * width + DTYPES[formats[source].scale].nbytes(rows * math.ceil(width / formats[source].block))
        for source, (rows, width) in shapes.items()
    )
