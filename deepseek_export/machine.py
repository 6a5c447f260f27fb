"""这台机器与这个进程：CPU、内存、GPU、进程占了多少，装着什么。只用标准库，``dsx doctor`` 与基准测试共用。"""

from __future__ import annotations

import os
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
#: 驱动坏了的机器上，``nvidia-smi`` 会等很久。
_ASK_SECONDS = 10


class ProcessMemory(NamedTuple):
    """一个进程的物理内存，字节；映射进来的文件页也算。

    Attributes:
        resident: 现在占多少（VmRSS）。
        peak: 从启动到现在最多占过多少（VmHWM）。不用 ``getrusage`` 的 ``ru_maxrss``：它会从父进程继承，子进程比父进程小时就读错。
    """

    resident: int
    peak: int


def process_memory(status: Path = _PROC / "self/status") -> ProcessMemory | None:
    """读本进程的内存；没有 ``/proc`` 的系统不知道。"""
    text = _read(status)
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", text, re.MULTILINE))
    if len(found) != 2:
        return None
    return ProcessMemory(int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024)


def cores() -> int:
    """这个进程能用的核数。"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """物理内存总量；有的系统不知道。"""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def cpu_flags(cpuinfo: Path = _PROC / "cpuinfo") -> set[str] | None:
    """Linux 的 CPU 标志；别的系统不知道。"""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read(cpuinfo), re.MULTILINE)
    return set(match[1].split()) if match else None


def cpu_model(cpuinfo: Path = _PROC / "cpuinfo") -> str | None:
    """Linux 的 CPU 型号；别的系统（和不写型号的 ARM 内核）不知道。"""
    match = re.search(r"^model name\s*:\s*(.*)$", _read(cpuinfo), re.MULTILINE)
    return match[1].strip() if match else None


class Gpu(NamedTuple):
    """一块 NVIDIA GPU。

    Attributes:
        name: 型号。
        sm: 计算能力，8.9 是 89。
        memory_bytes: 显存总量。
    """

    name: str
    sm: int
    memory_bytes: int


class Nvidia(NamedTuple):
    """驱动与它看得见的 GPU。

    Attributes:
        driver: 驱动的版本；没有驱动为 ``None``。
        gpus: 一块也没有就是空的。
        problem: 驱动在而问不出来的原因。
    """

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None


def nvidia(command: str = "nvidia-smi") -> Nvidia:
    """问驱动自带的 ``nvidia-smi``：不初始化 CUDA，不占显存。"""
    query = [
        command,
        "--query-gpu=driver_version,compute_cap,memory.total,name",
        "--format=csv,noheader,nounits",
    ]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except FileNotFoundError:
        return Nvidia()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Nvidia(problem=f"{command}：{error}")
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip().splitlines()
        return Nvidia(problem=said[0] if said else f"{command} 的退出码是 {asked.returncode}")
    gpus, driver = [], None
    for line in asked.stdout.splitlines():
        found = re.fullmatch(r"([\d.]+), (\d+)\.(\d+), (\d+), (.*)", line.strip())
        if found is None:
            return Nvidia(problem=f"看不懂 {command} 的 {line!r}")
        driver = found[1]
        gpus.append(Gpu(found[5], int(found[2] + found[3]), int(found[4]) << 20))
    return Nvidia(driver, tuple(gpus))


def installed(*names: str) -> str | None:
    """这几个名字里头一个装了的包的版本，不导入它；都没有装是 ``None``。"""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
