"""主模型与草稿模型共用的会话：握着一个 :class:`~deepseek_export.backend.base.Runner`，做主机侧的检查。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np

from deepseek_export.backend.base import Caches, Limits, Runner
from deepseek_export.backend.closed import ClosedRunner
from deepseek_export.backend.contract import TOKEN_INPUTS
from deepseek_export.errors import DsxError


class GraphSession:
    """无状态：序列的状态全在 :class:`~deepseek_export.backend.base.Caches` 里，同一会话可以服务多个批次。几个线程一起用，一次走一个。

    用完可以 :meth:`close`，也可以写成 ``with``；不关的，没有人用了就放掉。

    Args:
        runner: 加载好的图。
        extra: token 三件套与缓存之外，应当有的输入。
        outputs: 应当有的输出。

    Attributes:
        runner: 同参数。
        vocab_size: 词表大小 V。
        hidden_size: ``hidden`` 输出的宽度 D；没有这个输出时为 ``None``。

    Raises:
        DsxError: ``DSX-E508``，输入输出与约定不符。
    """

    def __init__(self, runner: Runner, extra: Iterable[str], outputs: Iterable[str]) -> None:
        runner.contract.check(extra, outputs)
        self.runner = runner
        self.vocab_size = runner.contract.vocab_size
        self.hidden_size = runner.contract.hidden_size
        self._float32: WeakKeyDictionary[Caches, np.ndarray] = WeakKeyDictionary()
        self._running = Lock()

    def close(self) -> None:
        """放掉图与权重；正在走的那一步走完。之后再用是 ``DSX-E522``；可以调几次。"""
        with self._running:
            self.runner.close()
            self.runner = ClosedRunner(self.runner)
            self._float32.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def limits(self) -> Limits:
        """后端在这张图上做得到什么。"""
        return self.runner.limits

    @property
    def max_positions(self) -> int:
        """一行至多多长。"""
        return self.runner.limits.max_positions

    @property
    def notes(self) -> tuple[str, ...]:
        """要告诉用户的话，例如退回了较慢的执行方式。"""
        return self.runner.notes

    def new_caches(self, batch: int, needed: int = 1) -> Caches:
        """给一个新批次分配清零的缓存，至少放得下 ``needed`` 个位置。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``；``DSX-E522``，关了。
        """
        return self.runner.new_caches(batch, needed)

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

    def call(
        self, outputs: tuple[str, ...], inputs: Mapping[str, np.ndarray], caches: Caches
    ) -> dict[str, np.ndarray]:
        """核对输入、跑一次，取回 ``outputs``。

        Raises:
            DsxError: ``DSX-E509``，token id 超出词表；执行失败见 :meth:`Runner.run`。
            ValueError: 形状不一致、位置越界或缓存容量不够（调用方的缺陷）。
        """
        ids, past_lens, positions = (inputs[name] for name in TOKEN_INPUTS)
        self.check_ids(ids)
        _check_shapes(ids, past_lens, positions, caches)
        with self._running:
            return self.runner.run(inputs, outputs, caches)

    def as_float32(self, array: np.ndarray, caches: Caches) -> np.ndarray:
        """``array`` 的 float32 版本：已经是就原样返回，否则转进 ``caches`` 专用、反复使用的一块内存。"""
        if array.dtype == np.float32:
            return array
        flat = self._float32.get(caches)
        if flat is None or flat.size < array.size:
            flat = self._float32[caches] = np.empty(array.size, np.float32)
        wide = flat[: array.size].reshape(array.shape)
        np.copyto(wide, array)
        return wide


def _check_shapes(
    input_ids: np.ndarray, past_lens: np.ndarray, logits_positions: np.ndarray, caches: Caches
) -> None:
    shapes = [list(array.shape) for array in (input_ids, past_lens, logits_positions)]
    if [len(shape) for shape in shapes] != [2, 1, 2] or {shape[0] for shape in shapes} != {caches.batch}:
        raise ValueError(f"要求 [B,S]、[B]、[B,L] 且 B={caches.batch}，实际是 {shapes}")
    new = input_ids.shape[1]
    if new == 0 or logits_positions.min() < 0 or logits_positions.max() >= new:
        raise ValueError(f"logits_positions 必须在 [0, {new}) 内")
    if past_lens.min() < 0 or past_lens.max() + new > caches.capacity:
        raise ValueError(f"past_lens={past_lens.tolist()} 加 {new} 个新位置放不进容量 {caches.capacity}")
