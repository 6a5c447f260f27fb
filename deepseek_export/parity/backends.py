"""``dsx compare`` 能交给谁去跑：名字 → 怎么把一个 ONNX 文件跑若干次。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime as ort
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.engine.derived import check_buildable
from deepseek_export.engine.flavour import FLAVOURS
from deepseek_export.engine.graph import fix_capacity
from deepseek_export.engine.shapes import has_prefill
from deepseek_export.errors import DsxError
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tensorrt import TensorRTRunner
from deepseek_export.passes.lower_mla_to_tensorrt import MAX_DECODE_TOKENS
from deepseek_export.runtime.cuda import require_gpu
from deepseek_export.runtime.plan import find_engine

#: ONNX 文件、每次的输入 → 每次的输出。
Run = Callable[[Path, Sequence[Mapping[str, np.ndarray]]], list[dict[str, np.ndarray]]]


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


@dataclass(frozen=True)
class Backend:
    """一个后端。

    Attributes:
        run: 怎么跑一张断开的图。
        graph: 从 bundle 的哪张图断开：``(entry, 缓存容量) -> 图``。
        suffix: 断开的图存进 ``<图名><suffix>/``。
    """

    run: Run
    graph: Callable[[GraphEntry, int], ModelGraph]
    suffix: str = ""


def _onnxruntime(bundle: Bundle) -> Backend:
    bundle.check_runs_on_onnxruntime()
    return Backend(run_onnxruntime, lambda entry, capacity: ModelGraph(bundle, entry.file))


def _tensorrt(bundle: Bundle) -> Backend:
    sm = require_gpu()
    check_buildable(bundle)
    reason = None
    if not has_prefill(bundle.manifest.profile):
        reason = f"mla.form=absorb 的插件核一次至多 {MAX_DECODE_TOKENS} 个 token，逐块比较的 prefill 更长"
    elif "bfloat16" in (bundle.manifest.dtype, bundle.manifest.cache.dtype):
        reason = "Polygraphy 的格式存不了 bfloat16，而 TensorRT 要缓存直接是图的输入，不能经过转换"
    if reason is not None:
        todo = "去掉 trt；整个模型用 dsx verify --backend trt 比"
        raise DsxError("DSX-E614", f"后端 trt：{reason}", todo)
    flavour = FLAVOURS[find_engine(bundle, sm)[1].flavour]

    def parsed(entry: GraphEntry, capacity: int) -> ModelGraph:
        model = onnx.load(bundle.path / entry.file, load_external_data=False)
        fix_capacity(model, capacity)
        return ModelGraph(bundle, entry.file, model)

    return Backend(TensorRTRunner(flavour, sm), parsed, ".trt")


BACKENDS: Mapping[str, Callable[[Bundle], Backend]] = MappingProxyType(
    {"ort": _onnxruntime, "trt": _tensorrt}
)


def open_backends(backends: Sequence[str], bundle: Bundle) -> dict[str, Backend]:
    """按名字取后端，保持次序；一个不可用就整个拒绝，不悄悄少比一个。

    Raises:
        DsxError: ``DSX-E613`` 没有这个后端；``DSX-E321`` ``ort`` 跑不了 bfloat16；``DSX-E918`` / ``DSX-E913`` / ``DSX-E614`` / ``DSX-E920`` / ``DSX-E917`` 这台机器、这个
            bundle 上用不了 TensorRT。
    """
    for name in backends:
        if name not in BACKENDS:
            raise DsxError("DSX-E613", f"后端 {name!r} 不存在", f"可用的后端：{'、'.join(BACKENDS)}")
    return {name: BACKENDS[name](bundle) for name in backends}
