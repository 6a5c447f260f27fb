"""一次模型调用的 io_binding：缓冲区反复使用，只重新绑定变了的部分。"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from deepseek_export.errors import DsxError
from deepseek_export.runtime.cache import CacheBuffers


class CallBinding:
    """某个 :class:`CacheBuffers` 专用的绑定。

    不持有缓存本身，否则会话里的弱引用表永远清不掉；缓存由每次调用传入。

    Args:
        session: ONNX Runtime 会话。
        vocab_size: 词表大小 V。
        logits_dtype: 会话输出 logits 的 dtype，float32 或 float16。
    """

    def __init__(self, session: ort.InferenceSession, vocab_size: int, logits_dtype: np.dtype) -> None:
        self._session = session
        self._vocab_size = vocab_size
        self._logits_dtype = logits_dtype
        self._io = session.io_binding()
        self._inputs: dict[str, np.ndarray] = {}
        self._raw_logits = np.empty((0, 0, 0), logits_dtype)
        self._logits = np.empty((0, 0, 0), np.float32)
        self._bound_version: int | None = None
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4

    def run(self, inputs: dict[str, np.ndarray], caches: CacheBuffers) -> np.ndarray:
        """跑一次。

        Args:
            inputs: 名字到整数数组；``logits_positions`` 为 ``[B, L]``，其余形状由约定给出。
            caches: 这个绑定所属的缓存，会被原地更新。

        Returns:
            ``[B, L, V]`` float32，内存归本对象，下一次 ``run`` 会覆盖它。

        Raises:
            DsxError: ``DSX-E513``，ONNX Runtime 执行失败。
        """
        for name, array in inputs.items():
            self._stage(name, array)
        self._stage_logits(*inputs["logits_positions"].shape)
        if self._bound_version != caches.version:
            caches.bind(self._io)
            self._bound_version = caches.version
        try:
            self._session.run_with_iobinding(self._io, self._options)
        except Exception as error:  # ORT 抛的类型不止一种，run_with_iobinding 还会抛裸的 RuntimeError
            raise DsxError(
                "DSX-E513", f"ONNX Runtime：{error}", "核对 bundle 是否完整（dsx verify），内存是否够用"
            ) from error
        if self._raw_logits is not self._logits:
            np.copyto(self._logits, self._raw_logits)
        return self._logits

    def _stage(self, name: str, array: np.ndarray) -> None:
        """把 ``array`` 写进绑好的缓冲区，形状变了才换缓冲区。"""
        staged = self._inputs.get(name)
        if staged is None or staged.shape != array.shape:
            staged = self._inputs[name] = np.empty(array.shape, np.int64)
            self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(staged))
        np.copyto(staged, array)

    def _stage_logits(self, batch: int, rows: int) -> None:
        shape = (batch, rows, self._vocab_size)
        if self._raw_logits.shape == shape:
            return
        self._raw_logits = np.empty(shape, self._logits_dtype)
        is_float32 = self._logits_dtype == np.float32
        self._logits = self._raw_logits if is_float32 else np.empty(shape, np.float32)
        self._io.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._raw_logits))
