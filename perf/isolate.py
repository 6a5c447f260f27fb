"""在新进程里调用一个函数，收下它的结果、用时与内存峰值；或让一个对象一直待在自己的进程里，一次问它一件事。

python -m perf.isolate [--serve] 模块:函数 '{"参数": ...}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from select import select
from tempfile import TemporaryFile
from time import perf_counter
from types import MappingProxyType
from typing import Any

from deepseek_export.machine import ProcessMemory, process_memory
from perf.results import ROOT

_SERVE = "--serve"
_NOTHING: Mapping[str, str] = MappingProxyType({})


def call(function: str, environment: Mapping[str, str] = _NOTHING, /, **arguments: Any) -> dict[str, Any]:
    """在新进程里调用 ``模块:函数``，捕获的磁盘缓存关着。

    Args:
        function: ``模块:函数``。
        environment: 子进程另加的环境变量。
        **arguments: 函数的参数。

    Returns:
        ``seconds``（不含导入）、``peak``（整个进程，字节）与函数自己返回的字典。

    Raises:
        RuntimeError: 子进程失败，带它 stderr 的最后一行。
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__, function, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "DSX_NO_CACHE": "1", **environment},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{function}：{_last_line(done.stderr) or f'退出码 {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Answering:
    """一直开着的子进程，一次问它一件事：一行 JSON ``[方法, 参数]``，答一行 ``{"result": ...}`` 或 ``{"error": "原话"}``。

    几个轮流问，同一时刻就只有一个在算：各自的权重、线程池与内存都互不相干，机器忙闲变化时却能逐对地比。

    Args:
        name: 出错时怎么称呼它。
        command: 命令行；起来之后先答一行，准备好了或是为什么不行。
        environment: 子进程另加的环境变量。

    Raises:
        RuntimeError: 起不来，带子进程的原话。
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] = _NOTHING) -> None:
        self._function = name
        self._stderr = TemporaryFile("w+")  # noqa: SIM115 与进程同寿，close 时关
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
        try:
            self._reply()
        except RuntimeError:
            self.close()
            raise

    def ask(self, method: str, *, within: float | None = None, **arguments: Any) -> Any:
        """调用对象的一个方法，返回它的结果。

        Args:
            method: 方法名。
            within: 最多等几秒，过了就杀掉这个进程；缺省一直等。
            **arguments: 方法的参数。

        Raises:
            RuntimeError: 方法抛了异常、超过了时限，或进程已经死了；带子进程的原话。
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # 死因由 _reply 说
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        # 一问一答，管道里至多一行，所以看管道就够了。
        if within is not None and not select([self._process.stdout], [], [], within)[0]:
            self._process.kill()
            raise RuntimeError(f"{self._function}：{method} 超过 {within:.0f} 秒")
        return self._reply()

    def memory(self) -> ProcessMemory:
        """这个进程的内存。

        Raises:
            RuntimeError: 系统没有 ``/proc``。
        """
        found = process_memory(Path(f"/proc/{self._process.pid}/status"))
        if found is None:
            raise RuntimeError("这个系统没有 /proc，量不了内存峰值")
        return found

    def close(self) -> None:
        """让进程结束，等它退出。"""
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._stderr.close()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._stderr.seek(0)
            last = _last_line(self._stderr.read())
            raise RuntimeError(f"{self._function}：退出码 {code}{f'，{last}' if last else ''}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self._function}：{found['error']}")
        return found["result"]


class Worker(Answering):
    """同上，里面是 ``模块:函数`` 造的一个对象，问的是它的方法。

    Args:
        function: ``模块:函数``（或类），在子进程里调用，得到被问的对象。
        environment: 子进程另加的环境变量。
        **arguments: 函数的参数，要能写成 JSON。

    Raises:
        RuntimeError: 造不出来，带子进程的原话。
    """

    def __init__(self, function: str, environment: Mapping[str, str] = _NOTHING, **arguments: Any) -> None:
        command = [sys.executable, "-m", __name__, _SERVE, function, json.dumps(arguments)]
        super().__init__(function, command, environment)


def main(function: str, arguments: str) -> None:
    """子进程这一侧。函数先做准备（导入、造输入），返回要计时的可调用对象。"""
    work = _resolve(function)(**json.loads(arguments))
    began = perf_counter()
    extra = work()
    seconds = perf_counter() - began
    memory = process_memory()
    if memory is None:
        raise RuntimeError("这个系统没有 /proc，量不了内存峰值")
    print(json.dumps({"seconds": seconds, "peak": memory.peak, **extra}))


def serve(function: str, arguments: str) -> None:
    """:class:`Worker` 的子进程这一侧：一行一问，一行一答；库往标准输出写的东西改道标准错误。"""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**found: Any) -> None:
        replies.write(json.dumps(found) + "\n")
        replies.flush()

    try:
        served = _resolve(function)(**json.loads(arguments))
    except Exception as error:  # 对方要的是原话，不是这个进程的退出码
        reply(error=_words(error))
        return
    reply(result=None)
    for line in sys.stdin:
        method, keywords = json.loads(line)
        try:
            reply(result=getattr(served, method)(**keywords))
        except Exception as error:
            reply(error=_words(error))


def _resolve(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    if sys.argv[1] == _SERVE:
        serve(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
