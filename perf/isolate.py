"""在新进程里调用一个函数，收下它的结果、用时与内存峰值。

python -m perf.isolate 模块:函数 '{"参数": ...}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from time import perf_counter
from typing import Any

from deepseek_export.machine import process_memory
from perf.results import ROOT


def call(function: str, **arguments: Any) -> dict[str, Any]:
    """在新进程里调用 ``模块:函数``，捕获的磁盘缓存关着。

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
        env=os.environ | {"DSX_NO_CACHE": "1"},
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or f"退出码 {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{function}：{last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(function: str, arguments: str) -> None:
    """子进程这一侧。函数先做准备（导入、造输入），返回要计时的可调用对象。"""
    module, _, name = function.partition(":")
    work = getattr(import_module(module), name)(**json.loads(arguments))
    began = perf_counter()
    extra = work()
    seconds = perf_counter() - began
    memory = process_memory()
    if memory is None:
        raise RuntimeError("这个系统没有 /proc，量不了内存峰值")
    print(json.dumps({"seconds": seconds, "peak": memory.peak, **extra}))


if __name__ == "__main__":
    main(*sys.argv[1:])
