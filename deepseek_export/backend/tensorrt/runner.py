"""TensorRT 引擎上的一张图：缓存在显存里，输入输出绑同一块。

两个优化配置各一个执行上下文，按形状选；解码的一步由 :mod:`.replay` 用 CUDA graph 重放。
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np

from deepseek_export.backend.base import Caches, Limits, Runner
from deepseek_export.backend.contract import GraphContract, shape_of
from deepseek_export.backend.tensorrt.caches import DeviceCaches
from deepseek_export.backend.tensorrt.cuda import Buffer
from deepseek_export.backend.tensorrt.engine import BundleEngine, Call, open_engine, select_profile
from deepseek_export.backend.tensorrt.replay import Replayer
from deepseek_export.bundle import Bundle
from deepseek_export.engine.graph import KEY_SPAN
from deepseek_export.engine.shapes import span_of


class TensorRTRunner(Runner):
    """加载一个引擎。

    Args:
        bundle: 引擎所属的 bundle。
        path: 引擎的文件。
        limits: 它做得到什么，见 :meth:`TensorRTBackend.limits`。

    Raises:
        DsxError: 同 :func:`open_engine`。
    """

    def __init__(self, bundle: Bundle, path: Path, limits: Limits) -> None:
        self._engine = open_engine(bundle, path)
        self._replayer = Replayer(self._engine.loaded)
        self.contract, self.limits = self._engine.contract, limits
        self._bindings: WeakKeyDictionary[Caches, _Binding] = WeakKeyDictionary()

    @property
    def notes(self) -> tuple[str, ...]:
        """CUDA graph 用不了时说明原因。"""
        return self._replayer.notes

    def new_caches(self, batch: int, needed: int = 1) -> DeviceCaches:
        engine = self._engine
        return DeviceCaches.allocate(
            engine.loaded.cuda, self.contract.caches, batch, engine.shapes.capacity, needed
        )

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], caches: Caches
    ) -> dict[str, np.ndarray]:
        """同 :meth:`Runner.run`。

        Raises:
            DsxError: ``DSX-E921`` 形状放不下；``DSX-E914`` / ``DSX-E916`` 执行失败。
        """
        binding = self._bindings.get(caches)
        if binding is None:
            binding = self._bindings[caches] = _Binding(self._engine, self._replayer)
        return binding.run(inputs, outputs, cast(DeviceCaches, caches))


class _Binding:
    """某个 :class:`DeviceCaches` 专用的缓冲区；取回哪些输出不改变地址，录下的 CUDA graph 照样能用。

    Args:
        engine: 加载好的引擎。
        replayer: 由它执行。
    """

    def __init__(self, engine: BundleEngine, replayer: Replayer) -> None:
        self._engine, self._replayer = engine, replayer
        self._cuda, contract = engine.loaded.cuda, engine.contract
        self._inputs = {port.name: Buffer(self._cuda, port.numpy) for port in contract.inputs.values()}
        # 引擎的每个输出都要有地址，不取回的也要。
        self._outputs = {port.name: Buffer(self._cuda, port.numpy) for port in contract.outputs.values()}
        self._key_span = Buffer(self._cuda, np.dtype(np.int8))

    def run(
        self, inputs: Mapping[str, np.ndarray], wanted: tuple[str, ...], caches: DeviceCaches
    ) -> dict[str, np.ndarray]:
        sizes = self._engine.contract.sizes(inputs)
        profile = select_profile(self._engine.entry, {dim: sizes[dim] for dim in "BSLK" if dim in sizes})
        shapes = _input_shapes(self._engine.contract, sizes, caches.capacity)
        for port, buffer in self._inputs.items():
            buffer.reshape(shapes[port])
            buffer.send(inputs[port])
        for port, buffer in self._outputs.items():
            buffer.reshape(shape_of(port, sizes))
        buffers = self._inputs | self._outputs
        if (allowed := self._engine.entry.profiles[profile].get("P")) is not None:
            longest = int(inputs["past_lens"].max()) + sizes["S"]
            shapes[KEY_SPAN] = (sizes["B"], span_of(longest, allowed))
            self._key_span.reshape(shapes[KEY_SPAN])  # 只看形状，内容不必送过去
            buffers[KEY_SPAN] = self._key_span
        addresses = caches.addresses | {port: buffer.address for port, buffer in buffers.items()}
        self._replayer.run(Call(profile, tuple(shapes.items()), tuple(addresses.items())))
        for port in wanted:
            self._outputs[port].fetch()
        self._cuda.synchronize()
        return {port: self._outputs[port].array for port in wanted}


def _input_shapes(
    contract: GraphContract, sizes: Mapping[str, int], capacity: int
) -> dict[str, tuple[int, ...]]:
    shapes = {port: shape_of(port, sizes) for port in contract.inputs}
    for tensor in contract.caches.tensors:
        shapes[tensor.name] = (sizes["B"], tensor.heads, capacity, tensor.width)
    return shapes
