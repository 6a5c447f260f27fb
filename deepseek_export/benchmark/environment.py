"""环境块：每份报告都带上，数字离开它没有意义。"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from deepseek_export import __version__
from deepseek_export.machine import cores, cpu_flags, cpu_model, installed, memory_bytes

_LIBRARIES = ("torch", "onnxruntime", "onnx", "transformers", "numpy")
#: 决定矩阵乘快慢的那些标志；后三个是 ARM 的。
_FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16"),
)

#: 测量自己写的：先量的一套写了，后量的一套并不因此是改过的源码。
_WRITTEN = ("perf/history", "docs/perf")


def environment(threads: int | None, source: Path | None = None) -> dict[str, Any]:
    """测量当时的机器、库与负载。

    Args:
        threads: 这次用几个线程；``None`` 由 ONNX Runtime 决定。
        source: 源码的 git 检出，给了就记下版本；有没提交的改动时带 ``-dirty``，测量自己写的结果与图（:data:`_WRITTEN`）不算。
    """
    flags = cpu_flags()
    return {
        "cpu": {
            "model": cpu_model(),
            "machine": platform.machine(),
            "cores": cores(),
            "flags": None if flags is None else [flag for flag in _FLAGS if flag in flags],
        },
        "memory_bytes": memory_bytes(),
        # 开始时的负载：大于零说明机器上还有别的活，这次的时间不宜引用。
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {"deepseek-export": __version__, **{name: installed(name) for name in _LIBRARIES}},
        "threads": threads,
        "git": None if source is None else _revision(source),
    }


def _revision(source: Path) -> str | None:
    git = ("git", "-C", str(source))
    found = _output(*git, "describe", "--always")
    kept = [f":(exclude,top){path}" for path in _WRITTEN]
    if found and _output(*git, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *kept):
        return f"{found}-dirty"
    return found


def _gpus() -> list[dict[str, str]]:
    """NVIDIA 显卡与驱动；没有就是空表。"""
    rows = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    found = [row.rpartition(",") for row in (rows or "").splitlines()]
    return [{"name": name.strip(), "driver": driver.strip()} for name, _, driver in found]


def _output(*command: str) -> str | None:
    """命令的输出；没有这个程序，或它失败，都是 ``None``。"""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
