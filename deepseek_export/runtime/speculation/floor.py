"""止损线：投机不划算时停下。

止损线有两种：:class:`MeasuredFloor` 比实测的时间，整批一起停；:class:`SpeculativeFloor` 只看接受率，逐行停。前者准，但何时
停下取决于机器的快慢与同批的别人；``rejection`` 的输出与哪一轮起草有关，要靠后者才能凭种子复现。
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.errors import DsxError
from deepseek_export.runtime.sampling import is_integer, is_real

DEFAULT_WINDOW = 32


@dataclass(frozen=True)
class Round:
    """解码的一轮：起草（可以没有）加一次主模型调用；整批的，或其中一行的。

    Attributes:
        drafts: 这一轮起草了几个，各行不等就是最多的那一行；0 就是普通解码的一步。
        rows: 还没结束的行数。
        accepted: 这些行一共接受了几个草稿。
        tokens: 这些行一共产出几个 token。
        seconds: 用时。
    """

    drafts: int
    rows: int
    accepted: int
    tokens: int
    seconds: float


class Watch(Protocol):
    """一次生成里盯着止损线的状态。"""

    @property
    def wants_plain(self) -> bool:
        """下一轮要不要先不起草。"""

    def add(self, latest: Round) -> str | None:
        """记下一轮；该停了就给出一句说明，否则 ``None``。"""


class Floor(Protocol):
    """止损线：什么时候不再投机。"""

    @property
    def per_row(self) -> bool:
        """是不是逐行盯：给 :class:`Watch` 的都是一行自己的轮次，停也只停这一行。"""

    @property
    def max_plain_rounds(self) -> int:
        """两次起草之间至多插几轮普通解码；草稿模型之后要补算这么多行。"""

    def watch(self, num_draft_tokens: int) -> Watch:
        """为一次生成（逐行盯的，为其中一行）开始盯。"""


@dataclass(frozen=True)
class SpeculativeFloor:
    """止损线：一行最近 ``window`` 次主模型调用平均接受的草稿数低于它，这一行余下的就不再投机；不看时间，也不看别的行。

    Args:
        min_acceptance: 每次调用平均至少接受几个草稿才划算，有限且不小于 0。
        window: 看最近多少次带足草稿的调用；不够这么多次时不作判断。

    Raises:
        DsxError: ``DSX-E516``，取值不在允许范围内。
    """

    min_acceptance: float
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        if not (is_real(self.min_acceptance) and self.min_acceptance >= 0):
            raise refused(
                "min_acceptance", self.min_acceptance, "有限且不小于 0 的数；不要止损就把 floor 设为 None"
            )
        if not (is_integer(self.window) and self.window >= 1):
            raise refused("window", self.window, "不小于 1 的整数")

    @property
    def per_row(self) -> bool:
        return True

    @property
    def max_plain_rounds(self) -> int:
        return 0

    def watch(self, num_draft_tokens: int) -> Watch:
        return _AcceptanceWatch(self, num_draft_tokens)

    @classmethod
    def from_config(cls, config: ModelConfig, num_draft_tokens: int) -> SpeculativeFloor:
        """由模型的尺寸估出盈亏点。

        单步解码受权重读取限制，用每个 token 要读的权重数当开销：一个草稿读一层、拼接投影和输出头，
        主模型读所有层和输出头。验证 K+1 行比单步多出的开销没有算，所以这是下界。
        """
        head = config.vocab_size * config.hidden_size
        layers = [_layer_weights(config, layer) for layer in range(config.num_hidden_layers)]
        draft = _layer_weights(config, config.num_hidden_layers) + 2 * config.hidden_size**2 + head
        return cls(num_draft_tokens * draft / (sum(layers) + head))


class _AcceptanceWatch:
    """照着 :class:`SpeculativeFloor` 盯住最近的调用。"""

    wants_plain = False

    def __init__(self, floor: SpeculativeFloor, num_draft_tokens: int) -> None:
        self._floor = floor
        self._full = num_draft_tokens
        self._recent: deque[Round] = deque(maxlen=floor.window)

    def add(self, latest: Round) -> str | None:
        if latest.drafts != self._full:
            return None
        self._recent.append(latest)
        if len(self._recent) < self._floor.window:
            return None
        mean = sum(r.accepted for r in self._recent) / sum(r.rows for r in self._recent)
        if mean >= self._floor.min_acceptance:
            return None
        return (
            f"最近 {self._floor.window} 次调用平均只接受 {mean:.2f} 个草稿，低于止损线 "
            f"{self._floor.min_acceptance:.2f}，余下的改用普通解码"
        )


@dataclass(frozen=True)
class MeasuredFloor:
    """止损线：实测每个 token 的用时，投机不比普通解码快就不再投机。

    投机 ``window`` 轮，再普通解码 ``probe`` 轮，比两边每个 token 的秒数。赢了接着投机，下一次隔两倍的轮数再比，
    所以一直划算时，比较本身的开销趋近于零；输了余下的都用普通解码。

    Args:
        window: 第一次比较之前投机几轮。
        probe: 用来比较的普通解码轮数。

    Raises:
        DsxError: ``DSX-E516``，取值不在允许范围内。
    """

    window: int = 16
    probe: int = 4

    def __post_init__(self) -> None:
        for key, value in (("window", self.window), ("probe", self.probe)):
            if not (is_integer(value) and value >= 1):
                raise refused(key, value, "不小于 1 的整数")

    @property
    def per_row(self) -> bool:
        return False

    @property
    def max_plain_rounds(self) -> int:
        return self.probe

    def watch(self, num_draft_tokens: int) -> Watch:
        return _CostWatch(self, num_draft_tokens)


class _CostWatch:
    """照着 :class:`MeasuredFloor` 盯住用时。"""

    def __init__(self, floor: MeasuredFloor, num_draft_tokens: int) -> None:
        self._floor = floor
        self._full = num_draft_tokens
        self._window = floor.window
        self._drafted: list[Round] = []
        self._plain: list[Round] = []

    @property
    def wants_plain(self) -> bool:
        return len(self._drafted) >= self._window

    def add(self, latest: Round) -> str | None:
        if latest.drafts == self._full:
            self._drafted.append(latest)
        elif latest.drafts == 0:
            self._plain.append(latest)
        if len(self._plain) < self._floor.probe:
            return None
        drafted, plain = _seconds_per_token(self._drafted), _seconds_per_token(self._plain)
        self._window *= 2
        self._drafted, self._plain = [], []
        if drafted < plain:
            return None
        return f"实测投机解码每个 token {drafted * 1e3:.3g} ms，普通解码 {plain * 1e3:.3g} ms，余下的改用普通解码"


def _seconds_per_token(rounds: list[Round]) -> float:
    """用时取中位数：刚换形状的头一轮要分配缓冲区，不该算进去。"""
    seconds = statistics.median(r.seconds for r in rounds)
    return seconds * len(rounds) / sum(r.tokens for r in rounds)


class FloorWatch:
    """一次生成里，止损线让哪些行接着起草。

    Args:
        floor: 止损线；``None`` 表示一直起草。
        num_draft_tokens: 每次至多几个草稿。
        batch: 行数 B。

    Attributes:
        speculating: ``[B]`` bool，没有被停下的行。
    """

    def __init__(self, floor: Floor | None, num_draft_tokens: int, batch: int) -> None:
        self.speculating = np.ones(batch, bool)
        every = list(range(batch))
        groups = [] if floor is None else [[row] for row in every] if floor.per_row else [every]
        self._watches = [(rows, floor.watch(num_draft_tokens)) for rows in groups if floor is not None]
        self._verdicts: list[str] = []

    @property
    def drafting(self) -> np.ndarray:
        """``[B]`` bool，下一轮起草的行：没有被停下，也不必先走一步普通的来比。"""
        drafting = self.speculating.copy()
        for rows, watch in self._watches:
            if watch.wants_plain:
                drafting[rows] = False
        return drafting

    @property
    def notes(self) -> tuple[str, ...]:
        """停下的原因，一句；没有停下的就没有。"""
        others = len(self._verdicts) - 1
        return tuple(line + (f"（另有 {others} 行也停了）" if others else "") for line in self._verdicts[:1])

    def add(self, rounds: Mapping[int, Round], seconds: float, active: np.ndarray) -> None:
        """记下一轮。

        Args:
            rounds: 行号 → 这一行的一轮，只有还没结束的行。
            seconds: 整轮的用时。
            active: ``[B]`` bool，这一轮之后还没结束的行；都结束了就不必说停。
        """
        for rows, watch in self._watches:
            seen = [rounds[row] for row in rows if row in rounds and self.speculating[row]]
            if seen and (verdict := watch.add(_together(seen, seconds))) and active[rows].any():
                self.speculating[rows] = False
                self._verdicts.append(verdict)


def _together(rounds: Sequence[Round], seconds: float) -> Round:
    """几行的同一轮合成一个。"""
    return Round(
        max(one.drafts for one in rounds),
        sum(one.rows for one in rounds),
        sum(one.accepted for one in rounds),
        sum(one.tokens for one in rounds),
        seconds,
    )


def refused(key: str, value: object, allowed: str) -> DsxError:
    """投机解码的参数不在允许范围内（``DSX-E516``）。"""
    return DsxError("DSX-E516", f"{key}={value!r}", f"把 {key} 设为{allowed}")


def _layer_weights(config: ModelConfig, layer: int) -> int:
    """一个 token 经过这一层要读的权重数：注意力，加上稠密 FFN 或路由选中的专家。"""
    c, width, heads = config, config.hidden_size, config.num_attention_heads
    query = heads * c.qk_head_dim
    attention = width * query if c.q_lora_rank is None else c.q_lora_rank * (width + query)
    attention += width * c.latent_cache_values
    attention += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim) + heads * c.v_head_dim * width
    if not c.is_moe_layer(layer):
        return attention + 3 * width * c.intermediate_size
    experts = c.num_experts_per_tok + c.n_shared_experts
    return attention + 3 * width * c.moe_intermediate_size * experts + width * c.n_routed_experts
