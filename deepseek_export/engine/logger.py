"""TensorRT 的日志：进程里第一个 logger 说了算，所以每种发行只建一个，建一次引擎清空一次。"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def logger_for(trt: Any) -> Any:
    """这种发行的 logger，``records`` 是 ``(级别, 文字)`` 的列表。"""

    class Recorder(trt.ILogger):
        """只记不印；出错时由 dsx 取出来写进自己的错误。"""

        def __init__(self) -> None:
            super().__init__()
            self.records: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.records.append((severity, message))

        def clear(self) -> None:
            self.records.clear()

        def messages(self) -> list[str]:
            """全部文字。"""
            return [message for _, message in self.records]

        def errors(self) -> list[str]:
            """ERROR 与 INTERNAL_ERROR 的文字，去掉重复。"""
            bad = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            return list(dict.fromkeys(message for severity, message in self.records if severity in bad))

    return Recorder()
