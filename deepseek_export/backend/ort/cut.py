"""没有缓存绑定的图：喂进去、取出来。对齐校验用它跑截出来的一段。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from deepseek_export.backend.base import Arrays
from deepseek_export.backend.ort.session import SessionSettings, open_session, run_options
from deepseek_export.errors import DsxError

Call = Callable[[Arrays, Sequence[str]], list[np.ndarray]]


def open_model(model: bytes, settings: SessionSettings) -> Call:
    """内存里的模型 → 可反复调用的函数 ``(feeds, outputs) -> list[np.ndarray]``。

    Raises:
        DsxError: ``DSX-E507``，加载失败。
    """
    opened, options = open_session(model, settings), run_options()

    def call(feeds: Arrays, outputs: Sequence[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = opened.session.run(list(outputs), dict(feeds), options)
        return found

    return call


def run_file(model: Path, feeds: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """一个 ONNX 文件跑若干次；除了不打日志，与 ``polygraphy run --onnxrt`` 的设置相同，所以两边得到同样的数。

    Raises:
        DsxError: ``DSX-E616``，加载或执行失败，附 ONNX Runtime 原话。
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        with G_LOGGER.verbosity(G_LOGGER.ERROR), OnnxrtRunner(session) as runner:
            return [dict(runner.infer(dict(feed))) for feed in feeds]
    except Exception as error:  # ORT 抛的类型不止一种
        raise DsxError(
            "DSX-E616", f"ONNX Runtime：{error}", "看错误里的节点名；用 dsx verify --level op 逐个算子试"
        ) from error
