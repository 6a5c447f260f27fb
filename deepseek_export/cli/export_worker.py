"""在另一个进程里导出：服务的进程因此不背着 torch，要停的时候也停得下来（追踪到一半的线程停不下来）。

父进程在标准输入给一行 JSON，从标准输出一行一行地收进度与错误；它没有了，标准输入就到头，这里清掉写了一半的再退。
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from deepseek_export.errors import DsxError
from deepseek_export.progress import Progress, Unit


def export_elsewhere(options: Mapping[str, Any], progress: Progress) -> None:
    """在子进程里导出，进度照转；这里被打断，它也停下。

    Args:
        options: :func:`~deepseek_export.api.export` 的参数，写成 JSON 的样子：方案与量化是它们的 ``model_dump``。
        progress: 进度。

    Raises:
        DsxError: 子进程里的那一个，码与话都相同。
    """
    command = [sys.executable, "-m", "deepseek_export.cli.export_worker"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # 终端里按 Ctrl-C 归这里处理
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(dict(options)) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                name, arguments = json.loads(line)
                if name == "error":
                    raise DsxError(*arguments)
                getattr(progress, name)(*arguments)
        finally:
            child.stdin.close()
    if child.returncode:
        raise RuntimeError(f"导出的子进程以 {child.returncode} 结束")


class _Told(Progress):
    """进度写成一行 JSON：方法名与参数。"""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def tell(self, name: str, *arguments: object) -> None:
        """一行。"""
        self._out.write(json.dumps([name, arguments]) + "\n")
        self._out.flush()

    def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
        """进入一个阶段。"""
        self.tell("start", stage, total, unit)

    def advance(self, amount: int = 1, detail: str = "") -> None:
        """前进。"""
        self.tell("advance", amount, detail)

    def note(self, line: str) -> None:
        """要让用户看到的话。"""
        self.tell("note", line)


def main() -> None:
    """子进程。"""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # 别的库往标准输出印的，不混进去
    options = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    told = _Told(out)
    try:
        _export(options, told)
    except DsxError as error:
        told.tell("error", error.code, error.what, error.todo)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # 做完了：标准输出一关，父进程就会关上这里的标准输入


def _leave_with_the_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _export(options: dict[str, Any], progress: Progress) -> None:
    from deepseek_export import api
    from deepseek_export.checkpoint.weight_only import Quantization
    from deepseek_export.profile import OptimizationProfile

    asked = options.pop("quantization")
    quantization = Quantization.model_validate(asked) if isinstance(asked, dict) else asked
    api.export(
        Path(options.pop("checkpoint")),
        Path(options.pop("out")),
        OptimizationProfile.model_validate(options.pop("profile")),
        quantization=quantization,
        progress=progress,
        **options,
    )


if __name__ == "__main__":
    main()
