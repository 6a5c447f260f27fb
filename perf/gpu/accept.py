"""一条命令，几分钟，在一张 NVIDIA 卡上验收插件的 kernel（KERNEL-7、KERNEL-8）。

    python -m perf.gpu.accept --out DIR [--budget 540] [--phase NAME]... [--bundle OUT]

在检出的根目录运行，不装 dsx，不联网；只要 Python 3.11+、torch、triton、cuda-bindings、numpy。一步一个进程，各有时限，一项一行写进
``DIR/rows.jsonl``，写了就落盘：崩溃、卡死、不过、显存不够，都只影响自己。compute-sanitizer、ncu、g++ 有就用，没有写明。
拿回 DIR，在装了 dsx 的机器上 ``python -m perf add DIR`` 记进历史、画表。``--phase`` 只做这几步，接在 DIR 里已有的后面：
一次没有做完的下次补。给了 ``--bundle``（要装 dsx 与 TensorRT）最后建它的引擎，校验，生成一段，不在时限之内。

全部做成退出码是 0；有不过的、崩溃的、超时的是 1，因为没有工具、显存、时间而跳过的不算。没有 GPU 时只说一行，什么也不写。
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENTRY = (sys.executable, "-m", "perf.gpu.phase")
_NEEDED = ("torch", "triton", "cuda.bindings", "numpy")
_LAST_WORDS = 300
_ENGINE_LIMIT = 3600.0
_PROBE = 120


def main(arguments: Sequence[str] | None = None, entry: Sequence[str] = ENTRY) -> int:
    """解析参数，一步一步做。

    Args:
        arguments: 命令行；``None`` 是这个进程的。
        entry: 启动一步的命令，后面接步名与目录。
    """
    missing = [name for name in _NEEDED if not _installed(name)]
    if missing:
        print(f"缺少 {'、'.join(missing)}", file=sys.stderr)
        return 1
    from perf.gpu.phases import PHASES

    parser = argparse.ArgumentParser(prog="python -m perf.gpu.accept", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="结果写到这里；已有的接着写")
    parser.add_argument("--budget", type=float, default=540, help="整个命令的秒数上限")
    names = [phase.name for phase in PHASES]
    parser.add_argument("--phase", action="append", choices=names, help="只做这一步，可重复")
    parser.add_argument("--bundle", type=Path, help="另用这个 bundle 建引擎、校验、生成")
    options = parser.parse_args(arguments)
    return accept(options.out, options.budget, options.phase or names, options.bundle, entry)


def accept(
    folder: Path,
    budget: float,
    chosen: Sequence[str],
    bundle: Path | None = None,
    entry: Sequence[str] = ENTRY,
) -> int:
    """做 ``chosen`` 里的各步，结果写进 ``folder``；见模块说明。"""
    from deepseek_export.benchmark.environment import environment
    from perf.gpu import lines
    from perf.gpu.phases import PHASES

    try:
        probe = subprocess.run(
            [*entry, "probe", "-"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=_PROBE
        )
    except subprocess.TimeoutExpired:
        print(f"{_PROBE} 秒还问不出有没有 GPU", file=sys.stderr)
        return 1
    if probe.returncode:
        print(probe.stdout.strip() or "问不出有没有 GPU，原因见上", file=sys.stderr)
        return 1
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / lines.ROWS
    began, failed = time.monotonic(), False
    machine = environment(None, ROOT) | {"command": "python -m perf.gpu.accept", "cpu_library": None}
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    lines.append(rows, {"phase": "start", "started": started, "environment": machine})
    for phase in PHASES:
        if phase.name not in chosen:
            continue
        left = budget - (time.monotonic() - began)
        wrapper = tuple(word.format(folder=folder) for word in phase.wrapper)
        print(f"{phase.name}：{phase.title}", file=sys.stderr)
        if left < 5:
            outcome = {"status": "skipped", "detail": "时间用完了"}
        elif missing := [tool for tool in phase.tools if shutil.which(tool) is None]:
            outcome = {"status": "skipped", "detail": f"没有 {'、'.join(missing)}"}
        else:
            command = [*wrapper, *entry, phase.name, str(folder)]
            outcome = run(
                command, folder / f"{phase.name}.log", min(phase.limit, left), dict(phase.environment)
            )
        failed |= outcome["status"] not in ("ok", "skipped")
        lines.append(rows, {"phase": phase.name, **outcome})
        print(f"  {outcome['status']}  {outcome['detail']}", file=sys.stderr)
    if bundle is not None:
        command = [sys.executable, "-m", "perf.gpu.engine", str(bundle), str(folder)]
        outcome = run(command, folder / "engine.log", _ENGINE_LIMIT, {})
        failed |= outcome["status"] != "ok"
        lines.append(rows, {"phase": "engine", **outcome})
    print(f"{rows}：python -m perf add {folder} 把它记进历史", file=sys.stderr)
    return int(failed)


def run(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """在自己的进程组里执行一步，等到时限；超时连同它的子进程一起杀掉。

    Returns:
        ``status``（``ok``、``failed``、``crashed``、``timeout``）、``detail``、``elapsed`` 秒。
    """
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except BaseException as error:  # 被中断也不留下占着卡的进程
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    elapsed = {"elapsed": round(time.monotonic() - began, 3)}
    if code is None:
        return {"status": "timeout", "detail": f"超过 {limit:.0f} 秒，杀掉了", **elapsed}
    if code < 0:
        return {"status": "crashed", "detail": f"{signal.Signals(-code).name}；{_tail(log)}", **elapsed}
    if code:
        return {"status": "failed", "detail": f"退出码 {code}；{_tail(log)}", **elapsed}
    return {"status": "ok", "detail": "", **elapsed}


def _tail(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return text[-1][-_LAST_WORDS:] if text else ""


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
