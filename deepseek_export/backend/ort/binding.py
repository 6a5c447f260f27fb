"""一次模型调用的 io_binding：缓冲区反复使用，只重新绑定变了的部分。"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnxruntime as ort

from deepseek_export.backend.contract import Port, shape_of
from deepseek_export.backend.ort.caches import OrtCaches
from deepseek_export.backend.ort.session import run_options
from deepseek_export.backend.ort.values import ort_value
from deepseek_export.errors import DsxError

#: 一次算这么多个 token，就把它用过的工作内存还给系统：一段长提示词要几百 MB，之后逐个 token 的解码用不着。短的留着，再分配要花时间。
_LARGE_TOKENS = 512


class _Slot:
    """一个输入或输出的内存：按见过的最大形状分配，别的形状借用它的前一段。"""

    def __init__(self, dtype: np.dtype) -> None:
        self.array = np.empty(0, dtype)
        self._flat = self.array
        self._shape: tuple[int, ...] | None = None

    def reshape(self, shape: tuple[int, ...]) -> ort.OrtValue | None:
        """换成 ``shape``；形状没变时返回 ``None``，否则返回要重新绑定的 OrtValue。"""
        if shape == self._shape:
            return None
        size = math.prod(shape)
        if size > self._flat.size:
            self._flat = np.empty(size, self._flat.dtype)
        self.array = self._flat[:size].reshape(shape)
        self._shape = shape
        return ort_value(self.array)


class CallBinding:
    """某个 :class:`OrtCaches` 专用、输出固定的绑定。

    不持有缓存本身，否则 ``Runner`` 里的弱引用表永远清不掉；缓存由每次调用传入。

    Args:
        session: ONNX Runtime 会话。
        inputs: 缓存以外的输入。
        outputs: 缓存以外要取的输出；没列出的不绑定，也就不会被拷出来。
    """

    def __init__(
        self, session: ort.InferenceSession, inputs: Iterable[Port], outputs: Iterable[Port]
    ) -> None:
        self._session = session
        self._io = session.io_binding()
        self._inputs = {port.name: _Slot(port.numpy) for port in inputs}
        self._outputs = {port.name: _Slot(port.numpy) for port in outputs}
        self._bound_version: int | None = None
        self._options, self._shrinking = run_options(), run_options(shrink=True)

    def run(
        self, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int], caches: OrtCaches
    ) -> dict[str, np.ndarray]:
        """跑一次。

        Args:
            inputs: 名字到数组，名字与构造时给的相同；dtype 不同的会转换。
            sizes: 各个具名维度这一次的大小。
            caches: 这个绑定所属的缓存，会被原地更新。

        Returns:
            名字到输出。内存归本对象，下一次 ``run`` 会覆盖它。

        Raises:
            DsxError: ``DSX-E513``，ONNX Runtime 执行失败。
        """
        for name, slot in self._inputs.items():
            value = slot.reshape(inputs[name].shape)
            if value is not None:
                self._io.bind_ortvalue_input(name, value)
            np.copyto(slot.array, inputs[name])
        for name, slot in self._outputs.items():
            value = slot.reshape(shape_of(name, sizes))
            if value is not None:
                self._io.bind_ortvalue_output(name, value)
        if self._bound_version != caches.version:
            caches.bind(self._io)
            self._bound_version = caches.version
        large = sizes["B"] * sizes["S"] >= _LARGE_TOKENS
        try:
            self._session.run_with_iobinding(self._io, self._shrinking if large else self._options)
        except Exception as error:  # ORT 抛的类型不止一种，run_with_iobinding 还会抛裸的 RuntimeError
            raise DsxError(
                "DSX-E513", f"ONNX Runtime：{error}", "核对 bundle 是否完整（dsx verify），内存是否够用"
            ) from error
        return {name: slot.array for name, slot in self._outputs.items()}
