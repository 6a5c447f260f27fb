"""运行一个 MTP 草稿模块（``mtp.onnx``、``mtp.1.onnx``……）。"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_export.backend.base import Caches, Runner
from deepseek_export.backend.contract import TOKEN_INPUTS, contract_broken
from deepseek_export.runtime.graph import GraphSession


@dataclass(frozen=True)
class Drafted:
    """一次草稿调用的结果；各数组是缓冲区的视图，同一个 ``caches`` 的下一次调用会覆盖它们。

    Attributes:
        draft_id: ``[B]`` int64，最后一个 ``logits_positions`` 处的 argmax。
        hidden: ``[B, S, D]``，过了 shared_head.norm。
        logits: ``[B, L, V]`` float32；没有要求时为 ``None``。
    """

    draft_id: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray | None


class DraftSession(GraphSession):
    """一个加载好的草稿模块，有自己的缓存。

    Args:
        runner: 加载好的 ``mtp*.onnx``。

    Raises:
        DsxError: ``DSX-E508``，输入输出与约定不符。
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner, ("prev_hidden",), ("logits", "hidden", "draft_id"))
        if self.hidden_size is None:
            raise contract_broken("草稿模型 hidden 的形状不是 [B, S, 常数]")

    def run(
        self,
        input_ids: np.ndarray,
        prev_hidden: np.ndarray,
        past_lens: np.ndarray,
        logits_positions: np.ndarray,
        caches: Caches,
        want_logits: bool = False,
    ) -> Drafted:
        """跑一次，``caches`` 原地更新。

        Args:
            input_ids: ``[B, S]`` 整数，第 i 行是比 ``prev_hidden`` 晚一步的 token。
            prev_hidden: ``[B, S, D]``，主模型或前一个模块的 hidden。
            past_lens: ``[B]`` 整数，这次从缓存的哪一行写起。
            logits_positions: ``[B, L]`` 整数。
            caches: 批大小为 B、容量不小于 ``max(past_lens)+S``。
            want_logits: 是否取出 logits；不取就不拷贝。

        Raises:
            DsxError: ``DSX-E509``，token id 超出词表；执行失败见 :meth:`Runner.run`（ONNX Runtime 是 ``DSX-E513``）。
            ValueError: 形状不一致、位置越界或缓存容量不够（调用方的缺陷）。
        """
        if prev_hidden.shape != (*input_ids.shape, self.hidden_size):
            raise ValueError(f"prev_hidden 的形状是 {prev_hidden.shape}，应为 [B, S, {self.hidden_size}]")
        inputs = dict(zip(TOKEN_INPUTS, (input_ids, past_lens, logits_positions), strict=True))
        inputs["prev_hidden"] = prev_hidden
        outputs = ("draft_id", "hidden", "logits") if want_logits else ("draft_id", "hidden")
        got = self.call(outputs, inputs, caches)
        logits = self.as_float32(got["logits"], caches) if want_logits else None
        return Drafted(got["draft_id"], got["hidden"], logits)
