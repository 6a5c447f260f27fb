"""一个 bundle 在给定的上下文里解码时占多少内存：在自己的进程里量，不受别的东西干扰。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deepseek_export import api
from deepseek_export.benchmark.depth import DepthDecoder
from deepseek_export.machine import ProcessMemory, process_memory

_STEPS = 4
#: 大块内存一律直接向系统要、用完即还：不然缓存可能落在加载时用过又释放的堆里，前后之差量不出来（glibc 的设置，别的 libc 不理会）。
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


class MemorySample(BaseModel):
    """一个进程的内存，字节。

    Attributes:
        cache_computed: 按形状算的缓存大小。
        cache_resident: 建好并填满缓存前后，进程物理内存之差。
        loaded: 加载好模型时的物理内存。
        resident: 缓存填满、解码几步之后的物理内存。
        peak: 从进程启动到此的峰值。
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_computed: int
    cache_resident: int
    loaded: int
    resident: int
    peak: int


def memory_in_subprocess(
    bundle: Path, batch: int, context: int, threads: int | None = None
) -> MemorySample | None:
    """在新进程里加载 ``bundle``，填满 ``context`` 个 token 的缓存，解码几步，量内存。

    Returns:
        样本；系统没有 ``/proc`` 时为 ``None``。

    Raises:
        subprocess.CalledProcessError: 子进程失败，它的 stderr 已经原样转出。
    """
    if process_memory() is None:
        return None
    script = f"from {__name__} import main; main()"
    command = [sys.executable, "-c", script, str(bundle), str(batch), str(context), str(threads or 0)]
    environment = os.environ | _ALLOCATOR
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return MemorySample.model_validate_json(done.stdout.splitlines()[-1])


def measure(bundle: Path, batch: int, context: int, threads: int | None) -> MemorySample:
    """在这个进程里量；此前进程里不该有别的大东西。"""
    session = api.load(bundle, threads, verify_weights=False).session
    loaded = _memory().resident
    decoder = DepthDecoder(session, batch, context)
    filled = _memory().resident
    for _ in range(_STEPS):
        decoder.step()
    after = _memory()
    return MemorySample(
        cache_computed=decoder.caches.nbytes,
        cache_resident=filled - loaded,
        loaded=loaded,
        resident=after.resident,
        peak=after.peak,
    )


def _memory() -> ProcessMemory:
    memory = process_memory()
    assert memory is not None, "memory_in_subprocess 已经确认过"
    return memory


def main() -> None:
    """子进程这一侧：参数是 bundle、batch、上下文、线程数（0 为自动），最后一行是 JSON。"""
    batch, context, threads = (int(value) for value in sys.argv[2:])
    print(measure(Path(sys.argv[1]), batch, context, threads or None).model_dump_json())
