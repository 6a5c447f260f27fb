"""一张加载好的 ONNX 图：加载、缓存、绑定与主机侧检查，主模型与草稿模型共用。"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort

from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
from deepseek_export.runtime.binding import CallBinding
from deepseek_export.runtime.cache import CacheBuffers, CacheSpec, contract_broken, ort_value

NO_INITIALIZERS: Mapping[str, np.ndarray] = MappingProxyType({})
TOKEN_INPUTS = ("input_ids", "past_lens", "logits_positions")
_DTYPES: dict[str, np.dtype] = {
    DTYPES[name].onnx_type: DTYPES[name].numpy for name in ("int64", "float32", "float16", "bfloat16", "int8")
}
_LOGITS_TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
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


class GraphSession:
    """主模型与草稿模型共用的部分。无状态：序列的状态全在 :class:`CacheBuffers` 里。

    Args:
        model_path: ONNX 文件的路径；权重是旁边的外部数据，所以必须给路径而不是字节。
        threads: 算子内线程数；``None`` 由 ONNX Runtime 决定。
        max_positions: 模型的 max_position_embeddings，缓存容量的上限。
        initializers: 不在文件里、由调用方给出的权重（按引用的 bundle），会话借用它们的内存。
        library: 代替函数体的 C++ 算子库。

    Attributes:
        vocab_size: 词表大小 V。
        hidden_size: ``hidden`` 输出的宽度 D；没有这个输出时为 ``None``。
        cache_spec: 模型要的缓存。
        max_positions: 同参数。
        prefill_chunk: prefill 每块宜取的长度。
        logits_chunk: 一次调用至多能要几行 logits（此时新 token 也不能更多）；``None`` 不限。
        max_batch: 一次调用至多几行；``None`` 不限。
        notes: 要告诉用户的话，例如退回了较慢的执行方式。

    Raises:
        DsxError: ``DSX-E507``，加载失败，附 ONNX Runtime 原话；``DSX-E508``，输入输出与约定不符。
    """

    prefill_chunk = 512
    logits_chunk: int | None = None
    max_batch: int | None = None

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        max_positions: int,
        initializers: Mapping[str, np.ndarray] = NO_INITIALIZERS,
        library: CpuLibrary | None = None,
    ) -> None:
        self.max_positions = max_positions
        # ORT 只借用内存，要与会话同寿。
        self._initializers = {name: ort_value(array) for name, array in initializers.items()}
        self._library = library
        self._session = self._open(Path(model_path), threads, self._initializers)
        self.cache_spec = CacheSpec.from_session(self._session)
        self._input_types = {node.name: node.type for node in self._session.get_inputs()}
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self.vocab_size = self._logits_contract()
        self.hidden_size = self._width("hidden") if "hidden" in self._outputs else None
        self._bindings: WeakKeyDictionary[CacheBuffers, dict[tuple[str, ...], CallBinding]] = (
            WeakKeyDictionary()
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """见类说明；不断变长，说过的不再消失。"""
        return ()

    def new_caches(self, batch: int, needed: int = 1) -> CacheBuffers:
        """给一个新批次分配清零的缓存，至少放得下 ``needed`` 个位置。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
        """
        return CacheBuffers(self.cache_spec, batch, self.max_positions, needed)

    def check_ids(self, ids: np.ndarray, where: str = "input_ids") -> None:
        """在主机上核对 token id，不让越界的 id 进到 Gather 里。

        Args:
            ids: 任意形状的整数数组。
            where: 报错时怎么称呼这个数组。

        Raises:
            DsxError: ``DSX-E509``，不是整数或不在 ``[0, V)`` 内，附第一个出错的坐标。
        """
        todo = "确认 tokenizer 与模型来自同一个检查点"
        big = ids.dtype == object and all(type(token) is int for token in ids.flat)  # 64 位放不下的
        if ids.dtype.kind not in "iu" and not big:
            raise DsxError("DSX-E509", f"{where} 的 dtype 是 {ids.dtype}，不是整数", todo)
        if ids.size == 0 or (ids.min() >= 0 and ids.max() < self.vocab_size):
            return
        at = np.argwhere((ids < 0) | (ids >= self.vocab_size))[0]
        value = int(ids[tuple(at)])
        raise DsxError("DSX-E509", f"{where}{at.tolist()} = {value}，不在 [0, {self.vocab_size}) 内", todo)

    def _open(
        self,
        path: Path,
        threads: int | None,
        initializers: Mapping[str, ort.OrtValue],
    ) -> ort.InferenceSession:
        return _load(path, threads, initializers, self._library)

    def _make_binding(self, inputs: Mapping[str, np.dtype], outputs: Mapping[str, np.dtype]) -> CallBinding:
        return CallBinding(self._session, inputs, outputs)

    def _binding(self, caches: CacheBuffers, outputs: tuple[str, ...]) -> CallBinding:
        """``caches`` 上取 ``outputs`` 这几个输出的绑定；同一组输出反复用同一个。"""
        made = self._bindings.setdefault(caches, {})
        if outputs not in made:
            cached = {tensor.name for tensor in self.cache_spec.tensors}
            types = {name: kind for name, kind in self._input_types.items() if name not in cached}
            made[outputs] = self._make_binding(
                {name: _DTYPES[kind] for name, kind in types.items()},
                {name: _DTYPES[self._outputs[name].type] for name in outputs},
            )
        return made[outputs]

    def _call(
        self, outputs: tuple[str, ...], inputs: Mapping[str, np.ndarray], caches: CacheBuffers
    ) -> tuple[CallBinding, dict[str, np.ndarray]]:
        """核对输入、跑一次；返回用到的绑定和各输出。"""
        tokens = [inputs[name] for name in TOKEN_INPUTS]
        self.check_ids(tokens[0])
        _check_shapes(tokens[0], tokens[1], tokens[2], caches)
        batch, new = tokens[0].shape
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (batch, tokens[2].shape[1], self.vocab_size),
            "hidden": (batch, new, self.hidden_size or 0),
        }
        binding = self._binding(caches, outputs)
        return binding, binding.run(inputs, {name: shapes.get(name, (batch,)) for name in outputs}, caches)

    def _check_contract(self, extra: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        """输入恰好是 token 三件套、缓存与 ``extra``，并且有 ``outputs`` 这些输出，dtype 都认得。"""
        expected = {*TOKEN_INPUTS, *extra, *(tensor.name for tensor in self.cache_spec.tensors)}
        found = set(self._input_types)
        if found != expected:
            missing, more = sorted(expected - found), sorted(found - expected)
            raise contract_broken(f"模型的输入不符：缺少 {missing}，多出 {more}")
        absent = sorted(set(outputs) - set(self._outputs))
        if absent:
            raise contract_broken(f"模型的输出不符：缺少 {absent}")
        kinds = self._input_types | {name: self._outputs[name].type for name in outputs}
        strange = {name: kind for name, kind in kinds.items() if kind not in _DTYPES}
        if strange:
            raise contract_broken(f"dtype 不在 {sorted(_DTYPES)} 里：{strange}")

    def _logits_contract(self) -> int:
        node = self._outputs.get("logits")
        if node is None:
            raise contract_broken("模型没有名为 logits 的输出")
        shape = list(node.shape)
        if node.type not in _LOGITS_TYPES or len(shape) != 3 or not isinstance(shape[2], int):
            raise contract_broken(f"logits 是 {node.type}{shape}，应为浮点的 [B, L, 常数]")
        return shape[2]

    def _width(self, name: str) -> int | None:
        shape = list(self._outputs[name].shape)
        return shape[2] if len(shape) == 3 and isinstance(shape[2], int) else None


def give_initializers(options: ort.SessionOptions, initializers: Mapping[str, ort.OrtValue]) -> None:
    """让会话用内存里的权重代替文件里的；它们要活得和会话一样久。"""
    if initializers:
        options.add_external_initializers(list(initializers), list(initializers.values()))


def use_library(options: ort.SessionOptions, library: CpuLibrary | None) -> None:
    """让会话优先用算子库里的 kernel，没有库就走函数体。"""
    if library is not None:
        options.register_custom_ops_library(str(library.path))


def _load(
    path: Path, threads: int | None, initializers: Mapping[str, ort.OrtValue], library: CpuLibrary | None
) -> ort.InferenceSession:
    if not path.is_file():
        raise DsxError("DSX-E507", f"{path} 不存在或不是文件", f"检查 bundle 路径；bundle 里应有 {path.name}")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # 只留 FATAL：要紧的事都由异常带出来
    # 主模型与草稿模型各有线程池，一边算、另一边的线程空转抢核：实测投机解码慢到 1.7 倍。一次 run 结束就停转，普通解码不受影响。
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    give_initializers(options, initializers)
    try:
        use_library(options, library)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT 的异常类都直接继承 Exception，没有共同基类
        raise DsxError("DSX-E507", f"{path}：{error}", _load_advice(str(error))) from error


def _load_advice(message: str) -> str:
    lowered = message.lower()
    for marks, advice in _LOAD_ADVICE:
        if any(mark in lowered for mark in marks):
            return advice
    return "确认文件由 dsx export 生成且没有损坏，必要时重新导出"


def _check_shapes(
    input_ids: np.ndarray, past_lens: np.ndarray, logits_positions: np.ndarray, caches: CacheBuffers
) -> None:
    shapes = [list(array.shape) for array in (input_ids, past_lens, logits_positions)]
    if [len(shape) for shape in shapes] != [2, 1, 2] or {shape[0] for shape in shapes} != {caches.batch}:
        raise ValueError(f"要求 [B,S]、[B]、[B,L] 且 B={caches.batch}，实际是 {shapes}")
    new = input_ids.shape[1]
    if new == 0 or logits_positions.min() < 0 or logits_positions.max() >= new:
        raise ValueError(f"logits_positions 必须在 [0, {new}) 内")
    if past_lens.min() < 0 or past_lens.max() + new > caches.capacity:
        raise ValueError(f"past_lens={past_lens.tolist()} 加 {new} 个新位置放不进容量 {caches.capacity}")
