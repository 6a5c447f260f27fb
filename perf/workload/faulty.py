"""会出毛病的边：两端之间隔着一个转手的线程，可以断、不递、递坏、递慢。契约测试与 perf 的套件共用。"""

from __future__ import annotations

import socket
import threading
import time
from typing import Literal

#: 断开、不再递、递坏、递慢。
Mode = Literal["cut", "hold", "corrupt", "slow"]
#: 慢的边，一块至多 64 KiB，每块多等几秒。
SLOW_S = 0.02


class FaultyEdges:
    """几条边，次序就是造出来的次序：0 是从发起的一端到 stage 0。

    Attributes:
        modes: 第几条边 → 怎么对待经过的字节；没有的原样递过去。
        made: 造过几条；整套重起之后接着数。
    """

    def __init__(self) -> None:
        self.modes: dict[int, Mode] = {}
        self.made = 0

    def link(self) -> tuple[socket.socket, socket.socket]:
        """造一条边，给 :class:`~deepseek_export.cluster.local.LocalLauncher`。"""
        sender, near = socket.socketpair()
        far, receiver = socket.socketpair()
        threading.Thread(target=self._pass, args=(self.made, near, far), daemon=True).start()
        self.made += 1
        return sender, receiver

    def _pass(self, number: int, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            while block := near.recv(1 << 16):
                mode = self.modes.get(number)
                if mode == "cut":
                    return
                if mode == "hold":
                    continue
                if mode == "slow":
                    time.sleep(SLOW_S)
                if mode == "corrupt":
                    block = bytes([*block[:-1], block[-1] ^ 0x40])
                try:
                    far.sendall(block)
                except OSError:
                    return
