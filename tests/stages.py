"""切开的 bundle，与数进程的办法。"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import deepseek_export
from deepseek_export.api import CompiledModel
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization
from tests.contract.test_mtp_contract import SMALL

#: 五层、一个草稿模块。
FIVE = SMALL | {"num_hidden_layers": 5}
#: 名字 → 怎么导出。
KINDS = {
    "float32": {"profile": "full"},
    "reference": {"profile": "full", "weights": "reference"},
    "int8": {"profile": "full", "target": "ort-cpu", "quantization": Quantization(kind="int8", block=32)},
    "baseline": {"profile": "baseline"},
}


def write_five(folder: Path) -> Path:
    """五层的小检查点。"""
    return write_checkpoint(folder, FIVE, dtype="float32", mtp=True)


@contextmanager
def loaded(path: Path, **options: object) -> Iterator[CompiledModel]:
    """加载好的模型；退出时停掉它的进程。"""
    model = deepseek_export.load(path, 1, **options)  # type: ignore[arg-type]
    try:
        yield model
    finally:
        model.close()


def alive(pids: Sequence[int]) -> list[int]:
    """还活着的（僵尸不算）。"""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def children() -> list[int]:
    """这个进程起的 stage 进程。"""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat[1]) == os.getpid() and b"deepseek_export.cluster.stage" in command:
            found.append(int(entry.name))
    return sorted(found)
