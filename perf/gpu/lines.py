"""一边量一边写的结果：一行一个 JSON，写一行就落盘一行，进程随时可以死。"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROWS = "rows.jsonl"


def append(path: Path, row: dict[str, Any]) -> None:
    """追加一行，返回时已经在盘上；前一个进程写了一半的行先断开。"""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """``folder`` 里的各行；写了一半的不算。

    Raises:
        FileNotFoundError: 里面没有结果。
    """
    path = folder / ROWS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} 里没有 {ROWS}，不是 python -m perf.gpu.accept 写的")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
