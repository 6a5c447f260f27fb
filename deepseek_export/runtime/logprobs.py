"""选出来的 token 与最可能的几个 token 的对数概率。"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepseek_export.runtime.sampling import top_ids


@dataclass(frozen=True)
class TokenLogprobs:
    """一个新 token 的对数概率（自然对数）。

    都是模型自己的：由原来的 logits 算出，在处理器、温度、截断之前，与 vLLM 缺省的 ``raw_logprobs`` 相同。

    Attributes:
        token: 选出来的 token。
        logprob: 它的对数概率。
        top: 最可能的几个 ``(token, 对数概率)``，从大到小，并列取较小的 id；选出来的不一定在里面。
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """一个 token 的对数概率。

    Args:
        logits: ``[V]`` 浮点，最大值有限，还没有改过。
        token: 选出来的。
        count: 另给最可能的几个，可以为 0。
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    ids = top_ids(scores, min(count, scores.size)) if count else np.empty(0, np.int64)
    top = tuple(zip(ids.tolist(), scores[ids].tolist(), strict=True))
    return TokenLogprobs(token, float(scores[token]), top)
