"""在 ONNX Runtime CPU 上运行一个 dsx 导出的 ``model.onnx``。"""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort

from deepseek_export.errors import DsxError
from deepseek_export.runtime.binding import CallBinding
from deepseek_export.runtime.cache import CacheBuffers, CacheSpec, contract_broken

_TOKEN_INPUTS = ("input_ids", "past_lens", "logits_positions")
_LOGITS_DTYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
# ORT 的异常类分不清原因（缺权重和缺算子都是 Fail），只能看原话；靠前的更具体。
_LOAD_ADVICE = (
    (("escapes model directory",), "ONNX Runtime 不跟随指向目录外的符号链接：改用硬链接或复制权重文件"),
    (
        ("external data path", "external initializer"),
        "权重文件缺失或不完整：把 model.onnx 和它旁边的权重一起复制，或重新导出",
    ),
    (
        ("not a registered function/op", "no op registered", "could not find an implementation"),
        "这个 ONNX Runtime 没有模型要的算子：升级 onnxruntime，或换 --target portable 重新导出",
    ),
    (("unsupported model ir version", "is under development"), "模型比 ONNX Runtime 新：升级 onnxruntime"),
)


class ModelSession:
    """一个加载好的模型。无状态：序列的状态全在 :class:`CacheBuffers` 里，同一会话可以服务多个批次。

    Args:
        model_path: ``model.onnx`` 的路径；权重是旁边的外部数据，所以必须给路径而不是字节。
        threads: 算子内线程数；``None`` 由 ONNX Runtime 决定。
        max_positions: 模型的 max_position_embeddings，缓存容量的上限。

    Attributes:
        vocab_size: 词表大小 V。
        cache_spec: 模型要的缓存。
        max_positions: 同参数。

    Raises:
        DsxError: ``DSX-E507``，加载失败，附 ONNX Runtime 原话；``DSX-E508``，输入输出与约定不符。
    """

    def __init__(
        self, model_path: str | os.PathLike[str], *, threads: int | None = None, max_positions: int
    ) -> None:
        self.max_positions = max_positions
        self._session = _load(Path(model_path), threads)
        self.cache_spec = CacheSpec.from_session(self._session)
        self._check_inputs()
        self.vocab_size, self._logits_dtype = self._logits_contract()
        self._bindings: WeakKeyDictionary[CacheBuffers, CallBinding] = WeakKeyDictionary()

    def new_caches(self, batch: int, needed: int = 1) -> CacheBuffers:
        """给一个新批次分配清零的缓存，至少放得下 ``needed`` 个位置。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
        """
        return CacheBuffers(self.cache_spec, batch, self.max_positions, needed)

    def run(
        self,
        input_ids: np.ndarray,
        past_lens: np.ndarray,
        logits_positions: np.ndarray,
        caches: CacheBuffers,
    ) -> np.ndarray:
        """跑一次前向，``caches`` 原地更新。

        第 b 行的新位置写在 ``past_lens[b] .. past_lens[b]+S-1``，右填充的位置也写，只是以后不会被读。

        Args:
            input_ids: ``[B, S]`` 整数。
            past_lens: ``[B]`` 整数，每行已有的长度。
            logits_positions: ``[B, L]`` 整数，这次调用的 S 行里要哪些行的 logits。
            caches: 批大小为 B、容量不小于 ``max(past_lens)+S``。

        Returns:
            ``[B, L, V]`` float32。内存会在同一个 ``caches`` 的下一次 ``run`` 时被覆盖，要留就先复制。

        Raises:
            DsxError: ``DSX-E509``，token id 超出词表；``DSX-E513``，ONNX Runtime 执行失败。
            ValueError: 形状不一致、位置越界或缓存容量不够（调用方的缺陷）。
        """
        self.check_ids(input_ids)
        _check_shapes(input_ids, past_lens, logits_positions, caches)
        binding = self._bindings.get(caches)
        if binding is None:
            binding = CallBinding(self._session, self.vocab_size, self._logits_dtype)
            self._bindings[caches] = binding
        inputs = dict(zip(_TOKEN_INPUTS, (input_ids, past_lens, logits_positions), strict=True))
        return binding.run(inputs, caches)

    def check_ids(self, ids: np.ndarray, where: str = "input_ids") -> None:
        """在主机上核对 token id，不让越界的 id 进到 Gather 里。

        Args:
            ids: 任意形状的整数数组。
            where: 报错时怎么称呼这个数组。

        Raises:
            DsxError: ``DSX-E509``，不是整数或不在 ``[0, V)`` 内，附第一个出错的坐标。
        """
        todo = "确认 tokenizer 与模型来自同一个检查点"
        if ids.dtype.kind not in "iu":
            raise DsxError("DSX-E509", f"{where} 的 dtype 是 {ids.dtype}，不是整数", todo)
        if ids.size == 0 or (ids.min() >= 0 and ids.max() < self.vocab_size):
            return
        at = np.argwhere((ids < 0) | (ids >= self.vocab_size))[0]
        value = int(ids[tuple(at)])
        raise DsxError("DSX-E509", f"{where}{at.tolist()} = {value}，不在 [0, {self.vocab_size}) 内", todo)

    def _check_inputs(self) -> None:
        found = {node.name for node in self._session.get_inputs()}
        expected = {*_TOKEN_INPUTS, *(tensor.name for tensor in self.cache_spec.tensors)}
        if found != expected:
            missing, extra = sorted(expected - found), sorted(found - expected)
            raise contract_broken(f"模型的输入不符：缺少 {missing}，多出 {extra}")

    def _logits_contract(self) -> tuple[int, np.dtype]:
        node = next((node for node in self._session.get_outputs() if node.name == "logits"), None)
        if node is None:
            raise contract_broken("模型没有名为 logits 的输出")
        shape = list(node.shape)
        if node.type not in _LOGITS_DTYPES or len(shape) != 3 or not isinstance(shape[2], int):
            raise contract_broken(f"logits 是 {node.type}{shape}，应为 float 或 float16 的 [B, L, 常数]")
        return shape[2], _LOGITS_DTYPES[node.type]


def _load(path: Path, threads: int | None) -> ort.InferenceSession:
    if not path.is_file():
        raise DsxError("DSX-E507", f"{path} 不存在或不是文件", "检查 bundle 路径；bundle 里应有 model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # 只留 FATAL：要紧的事都由异常带出来
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
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
