"""投机解码的统计，以及接受率太低时的止损线。"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.errors import DsxError

DEFAULT_WINDOW = 32


@dataclass(frozen=True)
class SpeculationStats:
    """一次生成里投机解码的表现；只算 decode，不算 prefill。

    一行在一次主模型调用里算一个「行次」，已结束的行不算；被 eos 或长度截掉的草稿也不算。

    Attributes:
        num_draft_tokens: 每次至多几个草稿。
        verify: 验证方式。
        acceptance: 第 i 个草稿的条件接受率：前 i 个都被接受之后，它被接受的比例；从未轮到为 ``None``。
        acceptance_overall: 第 i 个草稿的总接受率：提出之后被接受的比例；从未提出为 ``None``。
        mean_accepted: 每个带草稿的行次平均接受几个草稿。
        tokens_per_call: 每个行次平均产出几个 token；普通解码是 1。
        main_calls: 主模型调用次数。
        draft_calls: 草稿模型调用次数。
        fell_back: 是否因为接受率太低而中途改回普通解码。
    """

    num_draft_tokens: int
    verify: str
    acceptance: list[float | None]
    acceptance_overall: list[float | None]
    mean_accepted: float
    tokens_per_call: float
    main_calls: int
    draft_calls: int
    fell_back: bool

    def as_dict(self) -> dict[str, Any]:
        """可以直接写成 JSON 的字典。"""
        return asdict(self)


@dataclass(frozen=True)
class SpeculativeFloor:
    """止损线：最近 ``window`` 次主模型调用平均接受的草稿数低于它，余下的就不再投机。

    Args:
        min_acceptance: 每次调用平均至少接受几个草稿才划算，有限且不小于 0。
        window: 看最近多少次带足草稿的调用；不够这么多次时不作判断。

    Raises:
        DsxError: ``DSX-E516``，取值不在允许范围内。
    """

    min_acceptance: float
    window: int = DEFAULT_WINDOW

    def __post_init__(self) -> None:
        value = self.min_acceptance
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (real and math.isfinite(value) and value >= 0):
            raise refused("min_acceptance", value, "有限且不小于 0 的数；不要止损就把 floor 设为 None")
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise refused("window", self.window, "不小于 1 的整数")

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


class FloorWatch:
    """照着 :class:`SpeculativeFloor` 盯住最近的调用。"""

    def __init__(self, floor: SpeculativeFloor) -> None:
        self._floor = floor
        self._recent: deque[tuple[int, int]] = deque(maxlen=floor.window)

    def add(self, accepted: int, rows: int) -> None:
        """记下一次带足草稿的调用：``rows`` 行一共接受了 ``accepted`` 个。"""
        self._recent.append((accepted, rows))

    def verdict(self) -> str | None:
        """跌破止损线时给出一句说明，否则 ``None``。"""
        if len(self._recent) < self._floor.window:
            return None
        mean = sum(accepted for accepted, _ in self._recent) / sum(rows for _, rows in self._recent)
        if mean >= self._floor.min_acceptance:
            return None
        return (
            f"最近 {self._floor.window} 次调用平均只接受 {mean:.2f} 个草稿，低于止损线 "
            f"{self._floor.min_acceptance:.2f}，余下的改用普通解码"
        )


class Tally:
    """一边解码一边累计，最后给出 :class:`SpeculationStats`。"""

    def __init__(self, num_draft_tokens: int, verify: str) -> None:
        self._verify = verify
        self._proposed = np.zeros(num_draft_tokens, np.int64)
        self._reached = np.zeros(num_draft_tokens, np.int64)
        self._accepted = np.zeros(num_draft_tokens, np.int64)
        self._drafted_rows = 0
        self._rows = 0
        self._tokens = 0
        self.main_calls = 0

    def add(self, proposed: int, accepted: int, tokens: int) -> None:
        """记一个行次：提出几个草稿、接受几个、产出几个 token。"""
        self._rows += 1
        self._tokens += tokens
        if proposed:
            self._drafted_rows += 1
            self._proposed[:proposed] += 1
            self._reached[: min(accepted + 1, proposed)] += 1
            self._accepted[:accepted] += 1

    def stats(self, draft_calls: int, fell_back: bool) -> SpeculationStats:
        """汇总。"""
        return SpeculationStats(
            num_draft_tokens=len(self._proposed),
            verify=self._verify,
            acceptance=_ratios(self._accepted, self._reached),
            acceptance_overall=_ratios(self._accepted, self._proposed),
            mean_accepted=int(self._accepted.sum()) / max(self._drafted_rows, 1),
            tokens_per_call=self._tokens / max(self._rows, 1),
            main_calls=self.main_calls,
            draft_calls=draft_calls,
            fell_back=fell_back,
        )


def refused(key: str, value: object, allowed: str) -> DsxError:
    """投机解码的参数不在允许范围内（``DSX-E516``）。"""
    return DsxError("DSX-E516", f"{key}={value!r}", f"把 {key} 设为{allowed}")


def _ratios(part: np.ndarray, whole: np.ndarray) -> list[float | None]:
    return [p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]


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
