"""被比的：``dsx serve``、llama.cpp 的 ``llama-server``（都是子进程，都经 HTTP），与不经 HTTP 的引擎、生成器（住在 Worker 里）。"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, perf_counter, sleep
from types import TracebackType
from typing import Any, Self

import numpy as np

from perf.results import ROOT
from perf.servers.load import Heard, Job, Measured, closed_loop

#: ``llama-server`` 在哪里；不写就在 PATH 里找。怎么编译见 docs/peers.md。
LLAMA_SERVER = "DSX_LLAMA_SERVER"
_READY_S = 300.0
_STOP_S = 30.0


class ServerProcess:
    """一个服务进程，就绪了才返回；写成 ``with``，离开时停掉。

    Args:
        command: 命令行。
        port: 它会监听的端口。
        health: 就绪时答 200 的路径。

    Raises:
        RuntimeError: 起不来，带它的最后几行。
    """

    def __init__(self, command: Sequence[str], port: int, health: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = TemporaryFile("w+b")  # noqa: SIM115 与进程同寿，close 时关
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            self._wait(port, health)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """请它停下，等它退出；不听就杀掉。"""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait(self, port: int, health: str) -> None:
        until = monotonic() + _READY_S
        while monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"服务退出了（{self._process.returncode}）：{self._last_lines()}")
            with suppress(OSError, HTTPException):
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", health)
                if connection.getresponse().status == 200:
                    return
            sleep(0.1)
        raise RuntimeError(f"{_READY_S:.0f} 秒还没有就绪：{self._last_lines()}")

    def _last_lines(self) -> str:
        self._log.seek(0)
        return self._log.read()[-1000:].decode(errors="replace")


def dsx_serve(bundle: Path, threads: int, slots: int) -> ServerProcess:
    """``dsx serve``，模型名是 ``bench``。"""
    port = _free_port()
    options = ["--port", str(port), "--threads", str(threads), "--slots", str(slots), "--name", "bench"]
    return ServerProcess(
        [sys.executable, "-m", "deepseek_export", "serve", str(bundle), *options], port, "/ready"
    )


def llama_server(model: Path, threads: int, slots: int, context: int) -> ServerProcess:
    """``llama-server``：flash attention，连续批处理，一个槽 ``context`` 个 token；别的都是它的缺省。

    Raises:
        FileNotFoundError: 没有这个程序。
    """
    program, port = find_llama_server(), _free_port()
    options = {
        "--model": model,
        "--port": port,
        "--host": "127.0.0.1",
        "--threads": threads,
        "--parallel": slots,
        "--ctx-size": slots * context,
        "--flash-attn": "on",
        "--alias": "bench",
    }
    return ServerProcess(
        [program, *(str(part) for pair in options.items() for part in pair)], port, "/health"
    )


def find_llama_server() -> str:
    """``llama-server`` 的路径。

    Raises:
        FileNotFoundError: 没有。
    """
    named = os.environ.get(LLAMA_SERVER)
    found = named if named and Path(named).is_file() else shutil.which("llama-server")
    if found is None:
        raise FileNotFoundError(f"没有 llama-server（{LLAMA_SERVER} 或 PATH）：怎么编译见 docs/peers.md")
    return found


def llama_version() -> str:
    """``llama-server`` 自报的版本。"""
    done = subprocess.run([find_llama_server(), "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"version: .*", done.stdout + done.stderr)
    return match[0] if match else "不明"


class Local:
    """一个 bundle 的引擎与生成器，同一个会话，轮流用。"""

    def __init__(self, bundle: str, threads: int, slots: int) -> None:
        from deepseek_export import api
        from deepseek_export.serving import EngineSettings

        self._model = api.load(bundle, threads)
        self._settings = EngineSettings(slots=slots)
        self._slots = slots

    def closed_loop(self, todo: list[dict[str, Any]]) -> dict[str, Any]:
        """不经 HTTP 的闭环，客户数就是槽数。"""
        with self._model.engine(self._settings) as engine:

            def ask(job: Job) -> Heard:
                sent, arrivals = perf_counter(), []
                request = engine.submit(
                    job.prompt, max_new_tokens=job.new_tokens, ignore_eos=True, cache_salt=job.salt
                )
                for _ in request:
                    arrivals.append(perf_counter())
                return Heard(sent, arrivals, len(arrivals))

            found: Measured = closed_loop(ask, [Job(**job) for job in todo], self._slots)
        return asdict(found)

    def generator_step(self, prompt: int, new_tokens: int) -> float:
        """生成器批量解码的一步，秒：每个槽一行。"""
        rows = self._rows(prompt)
        found = self._model.generate(rows, new_tokens, ignore_eos=True, speculative=False)
        return found.decode_s / (new_tokens - 1)

    def engine_step(self, prompt: int, new_tokens: int) -> float:
        """引擎在满批次时的一步，秒：从最后一个请求加入，到第一个请求结束。

        Raises:
            RuntimeError: ``new_tokens`` 太少，最后一个还没有加入，第一个已经结束。
        """
        with self._model.engine(self._settings) as engine:
            stamps: list[float] = []
            rows = self._rows(prompt)
            waiting = [
                engine.submit(
                    row,
                    max_new_tokens=new_tokens,
                    ignore_eos=True,
                    listener=(lambda _: stamps.append(perf_counter())) if row is rows[-1] else None,
                )
                for row in rows
            ]
            ends = [request.result().timeline.finished for request in waiting]
        until = min(end for end in ends if end is not None)
        full = [stamp for stamp in stamps if stamp <= until]
        if len(full) < 2:
            raise RuntimeError(f"{new_tokens} 个新 token 太少：没有各行都在生成的两步")
        return (full[-1] - full[0]) / (len(full) - 1)

    def _rows(self, prompt: int) -> list[list[int]]:
        vocab = self._model.session.vocab_size
        return np.random.default_rng(0).integers(2, vocab, (self._slots, prompt)).tolist()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
