"""一台机器上守着一个 stage 进程的：连好上下游，起进程，看着它，要停就杀。

Ray 的启动器把它放进 actor。它与 stage 是两个进程：算的那个停住了，这个还听得见；这个没有了，内核杀掉那个。
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

from deepseek_export.cluster.handshake import accept, connect, listen
from deepseek_export.cluster.stage import StageSpec

_NOTHING: Mapping[str, str] = MappingProxyType({})


class StageHost:
    """一个 stage 的守着的人；各方法依次调用，不要几个线程同时调。

    Args:
        host: 在哪个地址上等上游。
        secret: 密钥，同一套里的都相同。
    """

    def __init__(self, host: str, secret: bytes) -> None:
        self._secret = secret
        self._listening = listen(host, secret)
        self._process: subprocess.Popen[bytes] | None = None
        self._spec: StageSpec | None = None

    def address(self) -> tuple[str, int]:
        """上游连到哪里。"""
        host, port = self._listening.getsockname()[:2]
        return host, port

    def start(self, spec: StageSpec, downstream: tuple[str, int], seconds: float) -> int:
        """等上游连来、连到下游，然后起进程；返回进程号。

        Args:
            spec: ``upstream``、``downstream``、``parent`` 由这里填。
            downstream: 下一个在哪里。
            seconds: 每一端至多等多少秒。

        Raises:
            DsxError: ``DSX-E749``，连不上，或对方证明不了自己。
        """
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(accept, self._listening, self._secret, seconds)
            going = connect(downstream, self._secret, seconds)
            upstream = coming.result()
        self._listening.close()
        with upstream, going:
            filled = replace(spec, upstream=upstream.fileno(), downstream=going.fileno(), parent=os.getpid())
            self._process, self._spec = spawn(filled), filled
        return self._process.pid

    def ended(self) -> str | None:
        """进程怎么结束的；还活着为 ``None``。"""
        return None if self._process is None else how_ended(self._process)

    def told(self) -> dict[str, Any]:
        """守着的是哪一个，进程怎样了；还没有起的，那几项是 ``None``。"""
        spec, process = self._spec, self._process
        return {
            "bundle": None if spec is None else spec.bundle,
            "index": None if spec is None else spec.index,
            "count": None if spec is None else spec.count,
            "pid": None if process is None else process.pid,
            "ended": self.ended(),
        }

    def kill(self) -> None:
        """杀掉进程；停着的也杀得掉。"""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def spawn(spec: StageSpec, environment: Mapping[str, str] = _NOTHING) -> subprocess.Popen[bytes]:
    """起一个 stage 进程，继承 ``spec`` 里的两个文件描述符；``environment`` 是另加的环境变量。

    Raises:
        OSError: 起不了。
    """
    return subprocess.Popen(
        [sys.executable, "-m", "deepseek_export.cluster.stage", json.dumps(asdict(spec))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(spec.upstream, spec.downstream),
        env={**os.environ, **environment},
        start_new_session=True,
    )


def how_ended(process: subprocess.Popen[bytes]) -> str | None:
    """进程怎么结束的；还活着为 ``None``。"""
    code = process.poll()
    if code is None:
        return None
    how = f"被信号 {-code} 终止" if code < 0 else f"以 {code} 退出"
    return f"进程 {process.pid} {how}"
