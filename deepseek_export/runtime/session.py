"""运行一个 dsx 导出的 ``model.onnx``，在哪个后端上都一样。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepseek_export.backend.base import Caches, Runner
from deepseek_export.backend.contract import TOKEN_INPUTS, contract_broken
from deepseek_export.errors import DsxError
from deepseek_export.runtime.graph import GraphSession
from deepseek_export.runtime.scores import LOGITS, Scores, wanted_outputs

VerifyMode = Literal["greedy", "rejection"]

_CHANCE_INPUTS = ("draft_probs", "uniform", "temperature")
_VERIFY_OUTPUTS = ("num_accepted", "next_id", "hidden")


@dataclass(frozen=True)
class Chance:
    """``rejection`` 模式一次验证要的随机量。

    Attributes:
        draft_probs: ``[B, K, V]`` float32，每个草稿是从哪个分布里抽的。
        uniform: ``[B, K+1]`` float32，``[0, 1)`` 内的均匀随机数。
        temperature: 大于 0。
    """

    draft_probs: np.ndarray
    uniform: np.ndarray
    temperature: float


@dataclass(frozen=True)
class Verified:
    """一次验证的结果；各数组是缓冲区的视图，同一个 ``caches`` 的下一次验证会覆盖它们。

    Attributes:
        num_accepted: ``[B]`` int64，每行接受了几个草稿。
        next_id: ``[B]`` int64，接受的草稿之后的那个 token。
        hidden: ``[B, S, D]``，这次调用各行过了末尾归一化的 hidden。
        scores: ``[B, L]`` 个位置的分数，logits 是模型的 dtype，不做转换。
    """

    num_accepted: np.ndarray
    next_id: np.ndarray
    hidden: np.ndarray
    scores: Scores


class ModelSession(GraphSession):
    """一个加载好的主模型。

    Args:
        runner: 加载好的 ``model.onnx``。

    Attributes:
        verify_mode: 图里带的是哪种草稿验证；普通 bundle 为 ``None``。

    Raises:
        DsxError: ``DSX-E508``，输入输出与约定不符。
    """

    def __init__(self, runner: Runner) -> None:
        self.verify_mode: VerifyMode | None = None
        extra: tuple[str, ...] = ()
        if "draft_ids" in runner.contract.inputs:
            rejection = any(name in runner.contract.inputs for name in _CHANCE_INPUTS)
            self.verify_mode = "rejection" if rejection else "greedy"
            extra = ("draft_ids", *(_CHANCE_INPUTS if rejection else ()))
        super().__init__(runner, extra, (*_VERIFY_OUTPUTS, "logits") if extra else ("logits",))
        if extra and self.hidden_size is None:
            raise contract_broken("hidden 的形状不是 [B, S, 常数]")

    def run(
        self,
        input_ids: np.ndarray,
        past_lens: np.ndarray,
        logits_positions: np.ndarray,
        caches: Caches,
    ) -> np.ndarray:
        """跑一次前向，``caches`` 原地更新。

        第 b 行的新位置写在 ``past_lens[b] .. past_lens[b]+S-1``，右填充的位置也写，只是以后不会被读。
        带草稿验证的模型也能这样用：填上占位的草稿，验证的结果不取。

        Args:
            input_ids: ``[B, S]`` 整数。
            past_lens: ``[B]`` 整数，每行已有的长度。
            logits_positions: ``[B, L]`` 整数，这次调用的 S 行里要哪些行的 logits。
            caches: 批大小为 B、容量不小于 ``max(past_lens)+S``。

        Returns:
            ``[B, L, V]`` float32。内存会在同一个 ``caches`` 的下一次 ``run`` 时被覆盖，要留就先复制。

        Raises:
            DsxError: ``DSX-E509``，token id 超出词表；执行失败见 :meth:`Runner.run`（ONNX Runtime 是 ``DSX-E513``）。
            ValueError: 形状不一致、位置越界或缓存容量不够（调用方的缺陷）。
        """
        inputs = self._inputs(input_ids, past_lens, logits_positions)
        return self.as_float32(self.call(("logits",), inputs, caches)["logits"], caches)

    def scores(
        self,
        input_ids: np.ndarray,
        past_lens: np.ndarray,
        logits_positions: np.ndarray,
        caches: Caches,
        want_logits: bool,
    ) -> Scores:
        """同 :meth:`run`；``want_logits`` 为假而图自己选得出最大的，就不取 logits。"""
        outputs = wanted_outputs(self.runner.contract, want_logits)
        if LOGITS in outputs:
            return Scores({LOGITS: self.run(input_ids, past_lens, logits_positions, caches)})
        inputs = self._inputs(input_ids, past_lens, logits_positions)
        return Scores.of(self.call(outputs, inputs, caches))

    def widened(self, scores: Scores, caches: Caches) -> Scores:
        """logits 换成 float32 的，见 :meth:`as_float32`。"""
        return scores if scores.logits is None else scores.each(lambda array: self.as_float32(array, caches))

    def hidden(self, input_ids: np.ndarray, past_lens: np.ndarray, caches: Caches) -> np.ndarray:
        """同 :meth:`run`，取的是每个新位置过了末尾归一化的 hidden。

        Returns:
            ``[B, S, D]`` float32，也会被覆盖。

        Raises:
            DsxError: ``DSX-E519``，图里没有它；其余同 :meth:`run`。
        """
        if self.verify_mode is None:
            todo = "用 --set mtp.enabled=true（-p mtp 或 -p full）重新导出：带草稿模型的图有它"
            raise DsxError("DSX-E519", "这个 bundle 的 model.onnx 没有 hidden 输出，只有 logits", todo)
        inputs = self._inputs(input_ids, past_lens, np.zeros((len(input_ids), 1), np.int64))
        return self.as_float32(self.call(("hidden",), inputs, caches)["hidden"], caches)

    def _inputs(
        self, input_ids: np.ndarray, past_lens: np.ndarray, logits_positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """缓存以外的输入；带草稿验证的图，草稿是占位的。"""
        inputs = dict(zip(TOKEN_INPUTS, (input_ids, past_lens, logits_positions), strict=True))
        if self.verify_mode is not None:
            batch, rows = logits_positions.shape
            inputs["draft_ids"] = np.zeros((batch, rows - 1), np.int64)
            if self.verify_mode == "rejection":
                probs = np.broadcast_to(np.float32(0), (batch, rows - 1, self.vocab_size))
                inputs |= _chance_inputs(Chance(probs, np.zeros((batch, rows), np.float32), 1.0))
        return inputs

    def verify(
        self,
        input_ids: np.ndarray,
        past_lens: np.ndarray,
        logits_positions: np.ndarray,
        draft_ids: np.ndarray,
        caches: Caches,
        chance: Chance | None = None,
        want_logits: bool = True,
    ) -> Verified:
        """跑一次前向并在图内验证草稿。

        Args:
            input_ids: ``[B, S]`` 整数；验证时是 ``[t_n, d_1 .. d_K]``，prefill 时是提示词的一块。
            past_lens: ``[B]`` 整数。
            logits_positions: ``[B, K+1]`` 整数，依次是 t_n 与各草稿所在的行。
            draft_ids: ``[B, K]`` 整数，K 可以为 0，此时 ``next_id`` 就是下一个 token。
            caches: 同 :meth:`run`。
            chance: ``rejection`` 模式必给，``greedy`` 模式不给。
            want_logits: 要不要 logits；不要而图自己选得出最大的，就不取。

        Raises:
            DsxError: 同 :meth:`run`。
            ValueError: 同 :meth:`run`；或模型不带草稿验证，或 L 不等于 K+1，或 ``chance`` 与模式不符。
        """
        if self.verify_mode is None:
            raise ValueError("这个模型不带草稿验证")
        if logits_positions.shape[1] != draft_ids.shape[1] + 1:
            raise ValueError(f"要求 L=K+1，实际 {logits_positions.shape} 与 {draft_ids.shape}")
        if (chance is not None) != (self.verify_mode == "rejection"):
            raise ValueError(f"{self.verify_mode} 模式{'要' if chance is None else '不要'} chance")
        inputs = dict(zip(TOKEN_INPUTS, (input_ids, past_lens, logits_positions), strict=True))
        inputs["draft_ids"] = draft_ids
        if chance is not None:
            inputs |= _chance_inputs(chance)
        scored = wanted_outputs(self.runner.contract, want_logits)
        got = self.call((*_VERIFY_OUTPUTS, *scored), inputs, caches)
        return Verified(got["num_accepted"], got["next_id"], got["hidden"], Scores.of(got))


def _chance_inputs(chance: Chance) -> dict[str, np.ndarray]:
    temperature = np.array([chance.temperature], np.float32)
    return dict(zip(_CHANCE_INPUTS, (chance.draft_probs, chance.uniform, temperature), strict=True))
