"""打开 ONNX Runtime 的会话：选项、权重、算子库，加载失败时怎么说。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime as ort

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.errors import DsxError

NO_INITIALIZERS: Mapping[str, np.ndarray] = MappingProxyType({})
#: 从内存里的模型建会话时，外部权重相对哪个目录。
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# ORT 的异常类分不清原因（缺权重和缺算子都是 Fail），只能看原话；靠前的更具体。
_LOAD_ADVICE = (
    (("escapes model directory",), "ONNX Runtime 不跟随指向目录外的符号链接：改用硬链接或复制权重文件"),
    (
        ("external data path", "external initializer"),
        "权重文件缺失或不完整：把 model.onnx 和它旁边的权重一起复制，或重新导出；"
        "按引用的 bundle 要经 deepseek_export.load 加载，或先 dsx pack",
    ),
    (
        ("not a registered function/op", "no op registered", "could not find an implementation"),
        "这个 ONNX Runtime 没有模型要的算子：升级 onnxruntime，或换 --target portable 重新导出",
    ),
    (("unsupported model ir version", "is under development"), "模型比 ONNX Runtime 新：升级 onnxruntime"),
)


@dataclass(frozen=True)
class SessionSettings:
    """会话怎么开。

    Attributes:
        threads: 算子内线程数；``None`` 由 ONNX Runtime 决定。
        initializers: 不在文件里的权重（按引用的 bundle）；会话借用它们的内存，由 :class:`OpenSession` 留住。
        library: 代替函数体的 C++ 算子库。
        profile: 打开 ONNX Runtime 自己的剖析，结果写到以它开头的文件。
        folder: 模型是内存里的字节时，外部权重相对哪个目录。
    """

    threads: int | None = None
    initializers: Mapping[str, np.ndarray] = field(default_factory=lambda: NO_INITIALIZERS)
    library: CpuLibrary | None = None
    profile: Path | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class OpenSession:
    """开好的会话，连同它借用的内存：两者要同寿。"""

    session: ort.InferenceSession
    borrowed: Mapping[str, ort.OrtValue]


def open_session(model: Path | bytes, settings: SessionSettings) -> OpenSession:
    """打开一个会话。

    Args:
        model: ONNX 文件，或模型的字节。
        settings: 怎么开。

    Raises:
        DsxError: ``DSX-E507``，加载失败，附 ONNX Runtime 原话。
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # 只留 FATAL：要紧的事都由异常带出来
    # 主模型与草稿模型各有线程池，一边算、另一边的线程空转抢核：实测投机解码慢到 1.7 倍。一次 run 结束就停转，普通解码不受影响。
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(settings.profile)
    if settings.folder is not None:
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(settings.folder.resolve()))
    borrowed = {name: ort_value(array) for name, array in settings.initializers.items()}
    if borrowed:
        options.add_external_initializers(list(borrowed), list(borrowed.values()))
    what = "模型" if isinstance(model, bytes) else str(model)
    try:
        if settings.library is not None:
            options.register_custom_ops_library(str(settings.library.path))
        source = model if isinstance(model, bytes) else str(model)
        return OpenSession(
            ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]), borrowed
        )
    except Exception as error:  # ORT 的异常类都直接继承 Exception，没有共同基类
        raise DsxError("DSX-E507", f"{what}：{error}", _load_advice(str(error))) from error


def run_options(shrink: bool = False) -> ort.RunOptions:
    """每次执行的选项：不打日志。

    Args:
        shrink: 执行完把空闲的工作内存还给系统；缺省由 ONNX Runtime 留着，下一次再用。
    """
    options = ort.RunOptions()
    options.log_severity_level = 4
    # 没有这一项时，onnxruntime 的 Python 层每次 run 都要接住一个 C++ 异常才知道，几十微秒；0 就是缺省。
    options.add_run_config_entry("gpu_graph_id", "0")
    if shrink:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def runtime_version() -> str:
    """ONNX Runtime 的版本。"""
    found: str = ort.__version__
    return found


def _load_advice(message: str) -> str:
    lowered = message.lower()
    for marks, advice in _LOAD_ADVICE:
        if any(mark in lowered for mark in marks):
            return advice
    return "确认文件由 dsx export 生成且没有损坏，必要时重新导出"
