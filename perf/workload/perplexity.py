"""量化之后的预测差多少：困惑度之比与 KL 散度，都带散布。

一个 token 的对数概率上下好几个 nat，两个模型在同一个 token 上的差却很小，所以只看成对的差；散布是按窗自助抽样的 95 % 区间，窗与窗之间近乎
独立。KL 散度看的是整个分布，不只是写在那里的那个 token，因此稳得多；文本若是没有量化的模型自己采样的，困惑度之比的期望就是 exp(KL)。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek_export.benchmark.spread import Spread
from deepseek_export.model import CompiledModel

#: 文本的名字 → 各窗的 token。
Texts = Mapping[str, Sequence[Sequence[int]]]
#: 文本的名字 → 各窗的对数概率，[S-1, V]：每个位置对下一个 token 的预测。
Predictions = Mapping[str, Sequence[np.ndarray]]

_RESAMPLES = 4000
_TAIL = 0.025


@dataclass(frozen=True)
class Losses:
    """一个模型在几段文本上的损失，每窗一项。

    Attributes:
        loss: 文本 → 各窗负对数概率之和（自然对数）。
        divergence: 文本 → 各窗 KL 散度之和，没有量化的对它的。
        tokens: 文本 → 各窗预测了几个 token。
    """

    loss: Mapping[str, np.ndarray]
    divergence: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]

    def perplexity(self, texts: Sequence[str]) -> float:
        """几段文本合在一起的困惑度。"""
        return float(np.exp(_joined(self.loss, texts).sum() / _joined(self.tokens, texts).sum()))

    def perplexity_ratio(self, plain: Losses, texts: Sequence[str]) -> Spread:
        """几段文本合在一起，对 ``plain`` 的困惑度之比。"""
        gaps = _joined(self.loss, texts) - _joined(plain.loss, texts)
        return _exp(_ratio(gaps, _joined(self.tokens, texts)))

    def divergence_per_token(self, texts: Sequence[str]) -> Spread:
        """几段文本合在一起，每个 token 的 KL 散度。"""
        return _ratio(_joined(self.divergence, texts), _joined(self.tokens, texts))

    def divergence_ratio(self, other: Losses, texts: Sequence[str]) -> Spread:
        """KL 散度是 ``other`` 的几倍，同样的窗一起抽。"""
        return _ratio(_joined(self.divergence, texts), _joined(other.divergence, texts))


def windows(ids: Sequence[int], length: int, limit: int | None = None) -> list[list[int]]:
    """切成不重叠的 ``length`` 个 token 的窗，末尾不满的不要；均匀地取至多 ``limit`` 个。"""
    starts = list(range(0, len(ids) - length + 1, length))
    if limit is not None and len(starts) > limit:
        starts = [starts[index * len(starts) // limit] for index in range(limit)]
    return [list(ids[start : start + length]) for start in starts]


def predictions(model: CompiledModel, texts: Texts) -> Predictions:
    """每窗里每个 token 由它之前的预测，第一个不算。"""
    return {name: [_predicted(model, window) for window in parts] for name, parts in texts.items()}


def losses(model: CompiledModel, texts: Texts, plain: Predictions) -> Losses:
    """``model`` 在各窗上的损失；``plain`` 是没有量化的模型在同样的窗上的 :func:`predictions`。"""
    loss, divergence, tokens = {}, {}, {}
    for name, parts in texts.items():
        rows = [
            _window(_predicted(model, window), window, want)
            for window, want in zip(parts, plain[name], strict=True)
        ]
        loss[name], divergence[name] = np.array(rows).T
        tokens[name] = np.array([len(window) - 1 for window in parts])
    return Losses(loss, divergence, tokens)


def _window(mine: np.ndarray, window: Sequence[int], plain: np.ndarray) -> tuple[float, float]:
    picked = mine[np.arange(len(mine)), window[1:]]
    return -float(picked.sum()), float((np.exp(plain) * (plain - mine)).sum())


def _predicted(model: CompiledModel, window: Sequence[int]) -> np.ndarray:
    scores = model.logits(list(window[:-1])).astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def _joined(found: Mapping[str, np.ndarray], texts: Sequence[str]) -> np.ndarray:
    return np.concatenate([found[text] for text in texts])


def _ratio(top: np.ndarray, bottom: np.ndarray) -> Spread:
    """两个和之比，与按窗自助抽样的区间。"""
    picks = np.random.default_rng(0).integers(0, len(top), (_RESAMPLES, len(top)))
    low, high = np.quantile(top[picks].sum(1) / bottom[picks].sum(1), (_TAIL, 1 - _TAIL))
    value = float(top.sum() / bottom.sum())
    return Spread(median=value, low=min(float(low), value), high=max(float(high), value), samples=(value,))


def _exp(spread: Spread) -> Spread:
    low, value, high = np.exp([spread.low, spread.median, spread.high]).tolist()
    return Spread(median=value, low=low, high=high, samples=(value,))
