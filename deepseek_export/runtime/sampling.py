"""从 logits 里选下一个 token：处理器 → 温度 → min-p → top-k → top-p，与 vLLM 同序。

惩罚与偏置都是处理器，见 :mod:`.processors`；随机数按行、按位置取，见 :mod:`.randomness`。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.runtime.randomness import RowStream, Use, row_streams
from deepseek_export.runtime.scores import Scores

#: OpenAI 的范围：存在、频率惩罚，偏置。
MAX_PENALTY, MAX_BIAS = 2.0, 100.0
#: 重复惩罚的范围：再大再小都会溢出，或早已只剩一个 token。
REPETITION_RANGE = (0.01, 100.0)
#: 每个 token 至多给几个候选的对数概率，与 OpenAI 相同。
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """一次生成的采样参数，构造时就校验；含义与 vLLM、OpenAI 相同。

    Args:
        temperature: 0 表示贪心（argmax，并列取较小的 id）；否则 logits 先除以它。有限且不小于 0。
        top_k: 只在 logit 最大的 k 个 token 里采样，并列取较小的 id；0 表示不限。
        top_p: 只保留累计概率达到 top_p 的最小集合；取值 (0, 1]，1 表示不限。
        seed: 随机种子，第 b 行用 ``seed + b``；``None`` 表示每次不同。
        min_p: 去掉概率不到最大那个的 min_p 倍的；取值 [0, 1]，0 表示不限。
        presence_penalty: 生成过的 token，logit 减去它；取值 [-2, 2]。
        frequency_penalty: 每生成过一次减去它一次；取值 [-2, 2]。
        repetition_penalty: 提示词里有的、生成过的 token，正的 logit 除以它，负的乘以它；取值 [0.01, 100]，1 表示不罚。
        min_tokens: 至少生成几个才可以结束：之前不选结束的 token，那些 token 的文本里也不找停止串。
        logit_bias: token id → 加在它的 logit 上的数，取值 [-100, 100]。
        allowed_token_ids: 只许选这些；``None`` 表示不限。
        logprobs: 每个新 token 另给对数概率：它自己的，以及最大的这么多个的，0 到 20；``None`` 不给。

    Raises:
        DsxError: ``DSX-E504``，取值不在允许范围内。
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        low, high = REPETITION_RANGE
        if not (is_real(self.temperature) and self.temperature >= 0):
            raise _refused("temperature", self.temperature, "有限且不小于 0 的数，0 表示贪心")
        if not (is_integer(self.top_k) and self.top_k >= 0):
            raise _refused("top_k", self.top_k, "不小于 0 的整数，0 表示不限")
        if not (is_real(self.top_p) and 0 < self.top_p <= 1):
            raise _refused("top_p", self.top_p, "(0, 1] 内的数，1 表示不限")
        if self.seed is not None and not (is_integer(self.seed) and self.seed >= 0):
            raise _refused("seed", self.seed, "不小于 0 的整数，或者不给")
        if not (is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise _refused("min_p", self.min_p, "[0, 1] 内的数，0 表示不限")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (is_real(value) and abs(value) <= MAX_PENALTY):
                raise _refused(name, value, f"[-{MAX_PENALTY:g}, {MAX_PENALTY:g}] 内的数，0 表示不罚")
        if not (is_real(self.repetition_penalty) and low <= self.repetition_penalty <= high):
            raise _refused(
                "repetition_penalty", self.repetition_penalty, f"[{low:g}, {high:g}] 内的数，1 表示不罚"
            )
        if not (is_integer(self.min_tokens) and self.min_tokens >= 0):
            raise _refused("min_tokens", self.min_tokens, "不小于 0 的整数，0 表示不管")
        if not isinstance(self.logit_bias, Mapping):
            raise _refused("logit_bias", self.logit_bias, "字典：token id → 偏置")
        for token, bias in self.logit_bias.items():
            if not (is_integer(token) and token >= 0):
                raise _refused("logit_bias 的键", token, "token id")
            if not (is_real(bias) and abs(bias) <= MAX_BIAS):
                raise _refused(f"logit_bias[{token}]", bias, f"[-{MAX_BIAS:g}, {MAX_BIAS:g}] 内的数")
        allowed = self.allowed_token_ids
        if allowed is not None and not (
            isinstance(allowed, list | tuple | set | frozenset)
            and allowed
            and all(is_integer(token) and token >= 0 for token in allowed)
        ):
            raise _refused("allowed_token_ids", allowed, "不空的 token id 列表，或者不给")
        if self.logprobs is not None and not (
            is_integer(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS
        ):
            raise _refused("logprobs", self.logprobs, f"0 到 {MAX_LOGPROBS} 的整数，或者不给")

    @property
    def greedy(self) -> bool:
        """是否为贪心解码。"""
        return self.temperature == 0

    @property
    def changes_logits(self) -> list[str]:
        """哪几个参数在温度之前改 logits；图内验证草稿做不到它们。"""
        neutral = SamplingParams()
        names = ["allowed_token_ids", "min_tokens", "logit_bias"]
        names += ["repetition_penalty", "frequency_penalty", "presence_penalty"]
        return [name for name in names if getattr(self, name) != getattr(neutral, name)]


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """算出一行里还留着的候选 token 和它们的概率。

    与 vLLM 的顺序一致：温度、min-p、top-k、top-p，最后重新归一化（transformers 把 min-p 放在 top-p 之后）。并列处与它们不同：
    它们把与第 k 名并列的 token 都留下，这里恰好留 k 个，并列取较小的 id，因此 top_k=1 就是贪心。

    Args:
        logits: ``[V]``，任意浮点 dtype；可以有 ``-inf``（被屏蔽的 token），不能有 NaN。
        params: 温度必须大于 0。

    Returns:
        ``(ids[K] int64, probs[K] float64)``，probs 全为正且和为 1。启用 top-k 或 top-p 时按概率从大到小排列。
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    with np.errstate(over="ignore"):  # 温度极小时 -x/t 溢出成 -inf，概率为 0，正是极限值
        scores /= params.temperature
    ids = np.arange(scores.size, dtype=np.int64)
    if 0 < params.top_k < scores.size:
        ids = top_ids(scores, params.top_k)
    if params.min_p > 0:  # 两种截断都只看大小，先后不改变留下的是哪些
        ids = ids[scores[ids] >= math.log(params.min_p)]
    if params.top_p < 1 and not 0 < params.top_k < scores.size:
        ids = ids[np.argsort(-scores[ids], kind="stable")]
    probs = np.exp(scores[ids])
    probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs) - probs
        keep = before < params.top_p  # 第一个的 before 为 0，所以至少留一个
        ids, probs = ids[keep], probs[keep]
    positive = probs > 0
    ids, probs = ids[positive], probs[positive]
    return ids, probs / probs.sum()


class Processor(Protocol):
    """选 token 之前改一行 logits：惩罚、偏置、语法……；与 transformers 的 ``LogitsProcessor`` 是一个意思。"""

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """只由参数决定：同样的 ``tokens`` 总给同样的结果，先后问哪几条都行（验证草稿时会退回去）。

        Args:
            scores: ``[V]`` float64，可以原地改；屏蔽一个 token 就给它 ``-inf``。
            tokens: 此前的整条序列：提示词、新 token、正在验证的草稿。

        Returns:
            ``[V]``，至少有一个有限的数。
        """


class RowSampler:
    """一行怎么选 token：自己的采样参数，自己的随机数，自己的处理器。

    Args:
        params: 采样参数。
        stream: 这一行的随机数；缺省由 ``params.seed`` 定。
        processors: 依次改 logits。
    """

    def __init__(
        self, params: SamplingParams, stream: RowStream | None = None, processors: Sequence[Processor] = ()
    ) -> None:
        self.params, self.processors = params, tuple(processors)
        self._stream = RowStream(params.seed) if stream is None else stream

    @property
    def plain(self) -> bool:
        """只取 logits 最大的那个：既不抽样，也没有处理器。"""
        return self.params.greedy and not self.processors

    @property
    def needs_logits(self) -> bool:
        """要不要 logits：只取最大的那个、又不要对数概率的不要。"""
        return not self.plain or self.params.logprobs is not None

    def pick(self, logits: np.ndarray, position: int, tokens: Sequence[int] = ()) -> int:
        """选一个 token。

        Args:
            logits: ``[V]`` 浮点，最大值有限。
            position: 要选的 token 在整条序列（提示词加新 token）里的下标。
            tokens: 它之前的整条序列；没有处理器时用不到。

        Raises:
            DsxError: ``DSX-E518``，处理器把每个 token 都屏蔽了。
        """
        if self.processors:
            logits = logits.astype(np.float64)
            for processor in self.processors:
                logits = processor(logits, tokens)
            if not np.isfinite(logits.max()):
                raise nothing_left(f"第 {position} 个位置上，每个 token 都被屏蔽了")
        if self.params.greedy:
            return int(logits.argmax())
        ids, probs = candidates(logits, self.params)
        cumulative = np.cumsum(probs)
        (aim,) = self._stream.uniforms(Use.NEXT, position) * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, aim, side="right")), ids.size - 1)])


def pick_tokens(
    logits: np.ndarray,
    positions: np.ndarray,
    samplers: Sequence[RowSampler],
    history: Callable[[int], Sequence[int]] | None = None,
) -> np.ndarray:
    """几行各选一个 token，每行照自己的参数；一行的结果只由它的种子、位置、此前的 token 与 logits 决定，与同批还有谁无关。

    Args:
        logits: ``[n, V]``，浮点，每行的最大值有限（见 :func:`check_peaks`）。
        positions: ``[n]`` 整数，要选的 token 在整条序列里的下标。
        samplers: n 行各自的。
        history: 给出第几行此前的整条序列；只问有处理器的行，都没有就不必给。

    Returns:
        ``[n]`` int64。

    Raises:
        DsxError: ``DSX-E518``，有一行没有 token 可选。
    """
    special = [slot for slot, sampler in enumerate(samplers) if not sampler.plain]
    if len(special) == len(samplers):
        picked = np.zeros(len(samplers), np.int64)
    else:
        picked = logits.argmax(axis=1).astype(np.int64, copy=False)
    for slot in special:
        sampler = samplers[slot]
        tokens = history(slot) if sampler.processors and history is not None else ()
        picked[slot] = sampler.pick(logits[slot], int(positions[slot]), tokens)
    return picked


class Sampler:
    """给一个固定的批次选 token，各行的参数相同。

    Args:
        params: 采样参数。
        batch: 行数 B。第 b 行的种子是 ``seed + b``。
        processors: 每行各自的处理器；不给就没有。
    """

    def __init__(
        self, params: SamplingParams, batch: int, processors: Sequence[Sequence[Processor]] | None = None
    ) -> None:
        each = [()] * batch if processors is None else processors
        streams = row_streams(params.seed, batch)
        self._rows = [RowSampler(params, *own) for own in zip(streams, each, strict=True)]

    @property
    def needs_logits(self) -> bool:
        """有没有一行要 logits，见 :attr:`RowSampler.needs_logits`。"""
        return any(row.needs_logits for row in self._rows)

    def choose(
        self,
        scores: Scores,
        positions: np.ndarray,
        rows: np.ndarray,
        history: Callable[[int], Sequence[int]] | None = None,
    ) -> np.ndarray:
        """同 :meth:`sample`，看的是 ``[n, 1]`` 个位置的分数；没有 logits 的就是各行最大的那个。"""
        if scores.logits is not None:
            return self.sample(scores.logits[:, 0], positions, rows, history)
        check_peaks(scores.peaks[:, 0], rows)
        return scores.ids[:, 0]

    def sample(
        self,
        logits: np.ndarray,
        positions: np.ndarray,
        rows: np.ndarray | None = None,
        history: Callable[[int], Sequence[int]] | None = None,
    ) -> np.ndarray:
        """给几行各选一个 token。

        Args:
            logits: ``[n, V]``，浮点。
            positions: ``[n]`` 整数，要选的 token 在整条序列（提示词加新 token）里的下标。
            rows: ``[n]`` 整数，是哪几行，不必按次序；缺省是前 n 行。
            history: 给出这一次的第几个（不是行号）此前的整条序列；没有处理器就不必给。

        Returns:
            ``[n]`` int64。

        Raises:
            ValueError: 形状不是 ``[n, V]``、``[n]`` 与 ``[n]``。
            DsxError: ``DSX-E505``，某行含 NaN 或 +Inf，或全是 -Inf；``DSX-E518``，处理器没有给某行留下 token。
        """
        rows = np.arange(len(positions)) if rows is None else rows
        if logits.ndim != 2 or not positions.shape == rows.shape == logits.shape[:1]:
            shapes = [list(array.shape) for array in (logits, positions, rows)]
            raise ValueError(f"要求 [n, V]、[n]、[n]，实际是 {shapes}")
        check_peaks(logits.max(axis=1), rows)  # max 会传播 NaN，一趟扫描就够
        return pick_tokens(logits, positions, [self._rows[row] for row in rows.tolist()], history)


def top_ids(scores: np.ndarray, k: int) -> np.ndarray:
    """最大的 k 个下标 ``[k]`` int64，从大到小，并列取较小的下标；只对够格的少数几个排序。``0 < k <= V``。"""
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    eligible = np.flatnonzero(scores >= threshold)  # 升序，稳定排序后并列者仍是小下标在前
    order = np.argsort(-scores[eligible], kind="stable")[:k]
    return eligible[order].astype(np.int64, copy=False)


def unusable_logits(row: int, peak: float) -> DsxError:
    """第 ``row`` 行 logits 的最大值 ``peak`` 不是有限数（``DSX-E505``）。"""
    return DsxError(
        "DSX-E505",
        f"第 {row} 行的 logits 里最大值是 {peak}，无法采样",
        "多半是 float16 溢出：换用 float32 重新导出，或用 dsx verify 找出第一个出错的层",
    )


def nothing_left(what: str) -> DsxError:
    """没有 token 可选（``DSX-E518``）。"""
    return DsxError("DSX-E518", what, "放宽 allowed_token_ids，减小 min_tokens，或去掉别的限制")


def check_peaks(peaks: np.ndarray, rows: np.ndarray) -> None:
    """``peaks[i]`` 是第 ``rows[i]`` 行 logits 的最大值；不是有限数就报 ``DSX-E505``。"""
    bad = np.flatnonzero(~np.isfinite(peaks))
    if bad.size:
        raise unusable_logits(int(rows[bad[0]]), float(peaks[bad[0]]))


def is_real(value: object) -> bool:
    """float 放得下的有限的数；``bool`` 不算。"""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # 大得 float 放不下的整数
        return False


def is_integer(value: object) -> bool:
    """整数；``bool`` 不算。"""
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(key: str, value: object, allowed: str) -> DsxError:
    return DsxError("DSX-E504", f"{key}={value!r} 不在允许范围内", f"把 {key} 设为{allowed}")
