"""ONNX Runtime CPU 上的一张图。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from deepseek_export.backend.base import Caches, Limits, Runner
from deepseek_export.backend.contract import GraphContract
from deepseek_export.backend.ort.binding import CallBinding
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.ort.session import NO_INITIALIZERS, SessionSettings, open_session
from deepseek_export.backend.ort.values import port_of
from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.errors import DsxError


class OrtRunner(Runner):
    """加载一个 ONNX 文件。

    Args:
        model_path: ONNX 文件；权重是旁边的外部数据，所以必须给路径而不是字节。
        threads: 算子内线程数；``None`` 由 ONNX Runtime 决定。
        max_positions: 模型的 max_position_embeddings，缓存容量的上限。
        initializers: 不在文件里的权重，会话借用它们的内存。
        library: 代替函数体的 C++ 算子库。
        profile: 打开剖析，见 :meth:`profile_events`。

    Raises:
        DsxError: ``DSX-E507``，加载失败，附 ONNX Runtime 原话；``DSX-E508``，输入输出与约定不符。
    """

    def __init__(
        self,
        model_path: Path | str,
        *,
        threads: int | None = None,
        max_positions: int,
        initializers: Mapping[str, np.ndarray] = NO_INITIALIZERS,
        library: CpuLibrary | None = None,
        profile: Path | None = None,
    ) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise DsxError(
                "DSX-E507", f"{path} 不存在或不是文件", f"检查 bundle 路径；bundle 里应有 {path.name}"
            )
        self._opened = open_session(path, SessionSettings(threads, initializers, library, profile))
        session = self._opened.session
        self.contract = GraphContract.of(
            map(port_of, session.get_inputs()), map(port_of, session.get_outputs())
        )
        self.limits = Limits(max_positions, grows=True)
        self._bindings: WeakKeyDictionary[OrtCaches, dict[tuple[str, ...], CallBinding]] = WeakKeyDictionary()

    def new_caches(self, batch: int, needed: int = 1) -> OrtCaches:
        return OrtCaches.allocate(self.contract.caches, batch, self.limits.max_positions, needed)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], caches: Caches
    ) -> dict[str, np.ndarray]:
        """同 :meth:`Runner.run`；执行失败是 ``DSX-E513``。"""
        own = cast(OrtCaches, caches)  # 这个 Runner 分配的
        return self._binding(own, outputs).run(inputs, self.contract.sizes(inputs), own)

    def profile_events(self) -> list[dict[str, Any]]:
        """停止剖析，读出全部事件；要以 ``profile`` 打开。"""
        return json.loads(Path(self._opened.session.end_profiling()).read_text(encoding="utf-8"))

    def _binding(self, caches: OrtCaches, outputs: tuple[str, ...]) -> CallBinding:
        """``caches`` 上取 ``outputs`` 这几个输出的绑定；同一组输出反复用同一个。"""
        made = self._bindings.setdefault(caches, {})
        if outputs not in made:
            made[outputs] = CallBinding(
                self._opened.session,
                self.contract.inputs.values(),
                [self.contract.outputs[name] for name in outputs],
            )
        return made[outputs]
