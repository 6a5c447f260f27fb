"""在 TensorRT 上运行 ``dsx build`` 的引擎，接口与 ONNX Runtime 的会话相同。

缓存在显存里，输入输出绑同一块；两个优化配置各一个执行上下文，按形状选；解码的一步由 :mod:`.replay` 用 CUDA graph 重放。
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from deepseek_export.bundle import Bundle
from deepseek_export.engine.record import EngineRecord
from deepseek_export.errors import DsxError
from deepseek_export.runtime.cache import CacheSpec
from deepseek_export.runtime.cuda import Buffer, Cuda
from deepseek_export.runtime.draft import DraftSession
from deepseek_export.runtime.plan import Call, TensorRTPlan, max_logits_rows, select_profile
from deepseek_export.runtime.replay import Replayer
from deepseek_export.runtime.session import ModelSession


class DeviceCaches:
    """一个批次在显存里的缓存；容量是建引擎时定的常数。

    Attributes:
        batch, capacity: B 与 T。
        version: 从不重新分配，总是 0。

    Raises:
        DsxError: ``DSX-E506``，``needed`` 超过容量。
    """

    def __init__(self, cuda: Cuda, spec: CacheSpec, batch: int, capacity: int, needed: int) -> None:
        self.batch, self.capacity, self.version = batch, capacity, 0
        self._cuda = cuda
        self.ensure(needed)
        self.addresses: dict[str, int] = {}
        for tensor in spec.tensors:
            nbytes = batch * tensor.heads * capacity * tensor.width * tensor.dtype.itemsize
            address = cuda.allocate(nbytes)
            cuda.clear(address, nbytes)
            self.addresses[tensor.name] = self.addresses[tensor.out_name] = address

    def ensure(self, needed: int) -> bool:
        """核对容量；从不重新分配。"""
        if needed > self.capacity:
            what = f"需要 {needed} 个位置，引擎的缓存容量是 {self.capacity}"
            raise DsxError("DSX-E506", what, "用 dsx build --profile-shapes T=更大的容量 重建")
        return False

    def __del__(self) -> None:
        for address in set(getattr(self, "addresses", {}).values()):
            self._cuda.free(address)


class TensorRTBinding:
    """某个 :class:`DeviceCaches` 专用的绑定；接口同 :class:`~deepseek_export.runtime.binding.CallBinding`。

    Args:
        plan: 加载好的 plan。
        replayer: 由它执行。
        inputs: 缓存以外的输入名与 dtype。
        outputs: 缓存以外要取回主机的输出名与 dtype。
    """

    def __init__(
        self,
        plan: TensorRTPlan,
        replayer: Replayer,
        inputs: Mapping[str, np.dtype],
        outputs: Mapping[str, np.dtype],
    ) -> None:
        self._plan, self._replayer, self._wanted = plan, replayer, tuple(outputs)
        self._inputs = {name: Buffer(plan.cuda, dtype) for name, dtype in inputs.items()}
        self._shapes = {node.name: node.shape for node in (*plan.get_inputs(), *plan.get_outputs())}
        # 引擎的每个输出都要有地址，不取回的也要。
        self._outputs = {
            node.name: Buffer(plan.cuda, node.dtype) for node in plan.get_outputs() if "T" not in node.shape
        }

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        output_shapes: Mapping[str, tuple[int, ...]],
        caches: DeviceCaches,
    ) -> dict[str, np.ndarray]:
        """跑一次；参数与返回同 ONNX Runtime 的绑定。

        Raises:
            DsxError: ``DSX-E921`` 形状放不下；``DSX-E914`` / ``DSX-E916`` 执行失败。
        """
        cuda, sizes = self._plan.cuda, self._sizes(inputs)
        profile = select_profile(self._plan.entry, sizes)
        dims = sizes | {"T": caches.capacity, "K+1": sizes.get("K", 0) + 1}
        shapes = {node.name: _resolve(node.shape, dims) for node in self._plan.get_inputs()}
        for port, buffer in self._inputs.items():
            buffer.reshape(shapes[port])
            np.copyto(buffer.array, inputs[port])
            cuda.upload(buffer.address, buffer.array)
        for port, buffer in self._outputs.items():
            buffer.reshape(_resolve(self._shapes[port], dims))
        buffers = self._inputs | self._outputs
        addresses = caches.addresses | {port: buffer.address for port, buffer in buffers.items()}
        self._replayer.run(Call(profile, tuple(shapes.items()), tuple(addresses.items())))
        for port in self._wanted:
            cuda.download(self._outputs[port].array, self._outputs[port].address)
        cuda.synchronize()
        return {port: self._outputs[port].array for port in self._wanted}

    def as_float32(self, array: np.ndarray) -> np.ndarray:
        """``array`` 的 float32 版本。"""
        return array if array.dtype == np.float32 else array.astype(np.float32)

    def _sizes(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, array in inputs.items():
            for dim, size in zip(self._shapes[name], array.shape, strict=True):
                if dim in ("B", "S", "L", "K"):
                    found[str(dim)] = size
        return found


class TensorRTGraph:
    """混进 :class:`~deepseek_export.runtime.graph.GraphSession` 的子类：加载、缓存、绑定换成 TensorRT 的。"""

    cache_spec: CacheSpec
    max_positions: int

    def __init__(self, bundle: Bundle, plan: Path) -> None:
        self._bundle, self.plan_path = bundle, plan
        shapes = EngineRecord.read(plan.parent).shapes
        limit = min(bundle.manifest.model.max_position_embeddings, shapes.capacity)
        super().__init__(plan, max_positions=limit)  # type: ignore[call-arg]

    def _open(
        self, path: Path, threads: int | None, initializers: Mapping[str, ort.OrtValue]
    ) -> TensorRTPlan:
        self._plan = TensorRTPlan(self._bundle, path)
        self._replayer = Replayer(self._plan)
        profiles = self._plan.entry.profiles.values()
        self.prefill_chunk = max(ranges["S"][2] for ranges in profiles)
        self.max_batch = max(ranges["B"][2] for ranges in profiles)
        verifies = any("K" in node.shape for node in self._plan.get_inputs())
        self.logits_chunk = max_logits_rows(self._plan.entry, verifies)
        return self._plan

    def _make_binding(
        self, inputs: Mapping[str, np.dtype], outputs: Mapping[str, np.dtype]
    ) -> TensorRTBinding:
        return TensorRTBinding(self._plan, self._replayer, inputs, outputs)

    @property
    def notes(self) -> tuple[str, ...]:
        """CUDA graph 用不了时说明原因。"""
        return self._replayer.notes

    def new_caches(self, batch: int, needed: int = 1) -> DeviceCaches:
        """显存里清零的缓存。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过引擎的容量。
        """
        return DeviceCaches(self._plan.cuda, self.cache_spec, batch, self._plan.shapes.capacity, needed)


class TensorRTSession(TensorRTGraph, ModelSession):  # type: ignore[misc]  # 缓存与绑定换了实现
    """主模型的引擎。"""


class TensorRTDraftSession(TensorRTGraph, DraftSession):  # type: ignore[misc]  # 同上
    """草稿模型的引擎。"""


def _resolve(shape: list[int | str], dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else dims[dim] for dim in shape)
