"""在本机上起一套 stage：每个一个子进程，用套接字对连成环。

套接字是继承给子进程的，不监听任何端口，别的用户连不进来，所以不要密钥。
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_export.cluster.gang import Started
from deepseek_export.cluster.host import how_ended, spawn
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.stage import StageSpec
from deepseek_export.cluster.wire import Channel
from deepseek_export.machine import nvidia

_VISIBLE = "CUDA_VISIBLE_DEVICES"

#: 一条边：前一个的发、后一个的收。
Link = Callable[[], tuple[socket.socket, socket.socket]]


@dataclass(frozen=True)
class LocalMember:
    """本机上的一个 stage 进程。"""

    index: int
    process: subprocess.Popen[bytes]

    @property
    def ended(self) -> str | None:
        """怎么结束的；还活着为 ``None``。"""
        how = how_ended(self.process)
        return None if how is None else f"stage {self.index} 的{how}"

    def kill(self) -> None:
        """杀掉并收尸；停着的也杀得掉。"""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class LocalLauncher:
    """本机的启动器。

    Attributes:
        directories: 各 stage 的目录。
        backend, threads: 每个 stage 在哪里跑，几个线程。
        link: 造一条边；缺省是套接字对。
    """

    directories: Sequence[Path]
    backend: str = "ort"
    threads: int | None = None
    link: Link = socket.socketpair

    def start(self, settings: ClusterSettings) -> Started:
        """起全部进程，不等它们加载；调用它的线程要活得比它们长。

        Raises:
            OSError: 起不了进程。
        """
        count = len(self.directories)
        gpus = visible_gpus() if self.backend == "trt" else []
        edges = [self.link() for _ in range(count + 1)]
        members: list[LocalMember] = []
        try:
            for index, directory in enumerate(self.directories):
                upstream, downstream = edges[index][1], edges[index + 1][0]
                spec = StageSpec(
                    bundle=str(directory),
                    index=index,
                    count=count,
                    backend=self.backend,
                    threads=self.threads,
                    silence_s=settings.silence_s,
                    start_s=settings.start_s,
                    upstream=upstream.fileno(),
                    downstream=downstream.fileno(),
                    parent=os.getpid(),
                )
                members.append(LocalMember(index, spawn(spec, only_gpu(gpus, index))))
        except BaseException:
            for member in members:
                member.kill()
            for edge in edges:
                for end in edge:
                    end.close()
            raise
        # 子进程那一头这里不留：它一死，邻居立刻读到结尾。
        for index in range(count):
            edges[index][1].close()
            edges[index + 1][0].close()
        return Started(
            Channel(edges[0][0], " stage 0 ", settings.silence_s),
            Channel(edges[-1][1], f" stage {count - 1} ", settings.start_s + settings.silence_s),
            tuple(members),
        )


def visible_gpus() -> list[str]:
    """这个进程看得见的 GPU，按 ``CUDA_VISIBLE_DEVICES`` 的写法；没有设就是驱动列出的全部，按总线上的次序。"""
    chosen = os.environ.get(_VISIBLE)
    if chosen is None:
        return [str(number) for number in range(len(nvidia().gpus))]
    return [name.strip() for name in chosen.split(",") if name.strip()]


def only_gpu(gpus: Sequence[str], index: int) -> dict[str, str]:
    """第 ``index`` 个 stage 只看得见一块：几块轮流用，一块就都用它。"""
    if len(gpus) < 2:
        return {}
    return {_VISIBLE: gpus[index % len(gpus)], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
