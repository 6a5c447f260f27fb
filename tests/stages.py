"""切开的 bundle，与数进程的办法。"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import deepseek_export
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.cluster.gang import Started
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.stage import StageSpec, run_stage
from deepseek_export.cluster.wire import Channel
from deepseek_export.model import CompiledModel
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


class _ThreadMember:
    """住在线程里的一个 stage；杀掉就是断开它的信道。"""

    ended = None

    def __init__(self, streams: Sequence[socket.socket]) -> None:
        self._streams = streams

    def kill(self) -> None:
        for stream in self._streams:
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class ThreadLauncher:
    """在本进程的线程里起各个 stage：GPU 的替身只在这个进程里。没有人发心跳，看不出谁停住了。"""

    directories: Sequence[Path]
    backend: str

    #: 没有心跳，沉默多久都不算断。
    settings: ClassVar[ClusterSettings] = ClusterSettings(silence_s=600.0, start_s=120.0)

    def start(self, settings: ClusterSettings) -> Started:
        count = len(self.directories)
        edges = [socket.socketpair() for _ in range(count + 1)]
        members = []
        for index, directory in enumerate(self.directories):
            upstream, downstream = edges[index][1], edges[index + 1][0]
            spec = StageSpec(
                bundle=str(directory),
                index=index,
                count=count,
                backend=self.backend,
                threads=1,
                silence_s=settings.silence_s,
                start_s=settings.start_s,
                upstream=upstream.fileno(),
                downstream=downstream.fileno(),
                parent=os.getpid(),
            )
            channels = (Channel(upstream, "前", 600.0), Channel(downstream, "后", 600.0))
            threading.Thread(target=run_stage, args=(spec, *channels), daemon=True).start()
            members.append(_ThreadMember((upstream, downstream)))
        first, last = Channel(edges[0][0], "首", 600.0), Channel(edges[-1][1], "末", 600.0)
        return Started(first, last, tuple(members))


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
