"""``dsx compare`` 能交给谁去跑：名字 → 怎么把一个 ONNX 文件跑若干次。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime as ort
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from deepseek_export.errors import DsxError

#: ONNX 文件、每次的输入 → 每次的输出。
Backend = Callable[[Path, Sequence[Mapping[str, np.ndarray]]], list[dict[str, np.ndarray]]]


def run_onnxruntime(model: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """ONNX Runtime CPU；除了不打日志，与 ``polygraphy run --onnxrt`` 的设置相同，所以两边得到同样的数。

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


BACKENDS: Mapping[str, Backend] = MappingProxyType({"ort": run_onnxruntime})

#: 说得出名字、这里跑不了的后端：原因，与改用什么。
_UNAVAILABLE = MappingProxyType(
    {
        "trt": (
            "引擎里没有块的边界，这一版不为断开的图另建引擎",
            "去掉 trt；整个模型用 dsx verify --backend trt 比",
        )
    }
)


def open_backends(names: Sequence[str]) -> dict[str, Backend]:
    """按名字取后端，保持次序；一个不可用就整个拒绝，不悄悄少比一个。

    Raises:
        DsxError: ``DSX-E613`` 没有这个后端；``DSX-E614`` 后端不能逐块跑。
    """
    available = "、".join(BACKENDS)
    for name in names:
        if name in _UNAVAILABLE:
            reason, todo = _UNAVAILABLE[name]
            raise DsxError("DSX-E614", f"后端 {name}：{reason}", f"{todo}；这里可用的后端：{available}")
        if name not in BACKENDS:
            raise DsxError("DSX-E613", f"后端 {name!r} 不存在", f"可用的后端：{available}")
    return {name: BACKENDS[name] for name in names}
