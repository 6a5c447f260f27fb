"""采样参数变成处理器：许可、最少长度、偏置、惩罚，与 vLLM 同序。

每个都只由（logits，此前的整条序列）决定。要数 token 的在里面记着上一次数到哪里，只数新来的；退回去、换一条序列来问，结果都一样。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deepseek_export.history import Follower
from deepseek_export.runtime.sampling import Processor, SamplingParams, nothing_left
from deepseek_export.runtime.session import ModelSession


def row_processors(
    params: SamplingParams, prompt_len: int, ends: Iterable[int], session: ModelSession
) -> tuple[Processor, ...]:
    """一行的处理器，依次是许可、最少长度、偏置、惩罚；用不到的没有。

    Args:
        params: 采样参数。
        prompt_len: 提示词的长度：之后的才是生成的。
        ends: 遇到它们就结束的 token；不在词表里的不要紧，选不到。
        session: 要用的模型，核对 token id。

    Raises:
        DsxError: ``DSX-E509``，``logit_bias`` 或 ``allowed_token_ids`` 里的 token id 不在词表里；``DSX-E518``，只许选结束的
            token，又不许结束。
    """
    stops = np.array(sorted(end for end in set(ends) if 0 <= end < session.vocab_size), np.int64)
    chosen: list[Processor] = []
    if params.allowed_token_ids is not None:
        allowed = np.array(list(params.allowed_token_ids))
        session.check_ids(allowed, "allowed_token_ids")
        if params.min_tokens > 0 and np.isin(allowed, stops).all():
            raise nothing_left(f"allowed_token_ids 里只有结束的 token，而 min_tokens={params.min_tokens}")
        chosen.append(AllowedTokens(allowed))
    if params.min_tokens > 0 and stops.size:
        chosen.append(MinTokens(stops, prompt_len + params.min_tokens))
    if params.logit_bias:
        session.check_ids(np.array(list(params.logit_bias)), "logit_bias 的键")
        chosen.append(LogitBias(params.logit_bias))
    if (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0):
        chosen.append(Penalties(params, prompt_len))
    return tuple(chosen)


class AllowedTokens:
    """只许选 ``ids`` ``[n]`` 里的。"""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = ids

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """其余的都屏蔽。"""
        masked = np.full_like(scores, -np.inf)
        masked[self._ids] = scores[self._ids]
        return masked


class MinTokens:
    """整条序列不到 ``length`` 个 token 时，不选 ``ends`` ``[n]`` 里的。"""

    def __init__(self, ends: np.ndarray, length: int) -> None:
        self._ends, self._length = ends, length

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """还太短就屏蔽结束的 token。"""
        if len(tokens) < self._length:
            scores[self._ends] = -np.inf
        return scores


class LogitBias:
    """给几个 token 的 logit 各加一个数：``bias`` 是 token id → 数。"""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = np.fromiter(bias.keys(), np.int64)
        self._bias = np.fromiter(bias.values(), np.float64)

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """加上偏置。"""
        scores[self._ids] += self._bias
        return scores


class Penalties:
    """重复、频率、存在三种惩罚。重复惩罚看整条序列（与 transformers、vLLM 相同），另两种只看生成的（OpenAI 的定义）。

    Args:
        params: 惩罚各是多少。
        prompt_len: 提示词的长度。
    """

    def __init__(self, params: SamplingParams, prompt_len: int) -> None:
        self._params, self._prompt_len = params, prompt_len
        self._counted = Follower()
        self._all: Counter[int] = Counter()
        self._generated: Counter[int] = Counter()

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """罚出现过的 token。"""
        self._follow(tokens)
        if self._params.repetition_penalty != 1:
            ids = np.fromiter(self._all, np.int64, len(self._all))
            seen, penalty = scores[ids], self._params.repetition_penalty
            scores[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        ids = np.fromiter(self._generated, np.int64, len(self._generated))
        counts = np.fromiter(self._generated.values(), np.float64, len(self._generated))
        scores[ids] -= self._params.frequency_penalty * counts + self._params.presence_penalty
        return scores

    def _follow(self, tokens: Sequence[int]) -> None:
        """数到 ``tokens`` 为止：与数过的相同的开头不重数，多出来的退掉。"""
        gone, new = self._counted.follow(tokens)
        kept = len(tokens) - len(new)
        for at, token in enumerate(gone, kept):
            self._count(at, token, -1)
        for at, token in enumerate(new, kept):
            self._count(at, token, 1)

    def _count(self, at: int, token: int, step: int) -> None:
        for counter in (self._all, self._generated) if at >= self._prompt_len else (self._all,):
            counter[token] += step
            if not counter[token]:
                del counter[token]
