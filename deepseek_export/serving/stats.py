"""引擎的计数。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class EngineStats:
    """某一时刻的读数；没有写明“现在”的都从引擎开始累计。

    Attributes:
        waiting, running: 现在排队的、已经开始的请求数。
        resident_rows: 现在只为前缀留着的行数。
        cache_bytes: 现在分配的缓存字节数。
        prompt_tokens: 开始了的请求的提示词 token 数。
        hit_tokens: 其中缓存现成的，没有重算。
        prefill_tokens: 重算了的。
        generated_tokens: 给出的新 token 数。
        prefill_calls, decode_steps: 模型调用的次数。
        finished: 为什么结束 → 请求数；``error`` 是失败的。
    """

    waiting: int
    running: int
    resident_rows: int
    cache_bytes: int
    prompt_tokens: int
    hit_tokens: int
    prefill_tokens: int
    generated_tokens: int
    prefill_calls: int
    decode_steps: int
    finished: Mapping[str, int]


class Counters:
    """一边跑一边累计；只有引擎的线程写。"""

    def __init__(self) -> None:
        self.prompt_tokens = self.hit_tokens = self.prefill_tokens = self.generated_tokens = 0
        self.prefill_calls = self.decode_steps = 0
        self.finished = dict.fromkeys(("eos", "stop", "length", "cancelled", "error"), 0)

    def count(self, outcome: str) -> None:
        """一个请求结束了。"""
        self.finished[outcome] += 1

    def snapshot(self, waiting: int, running: int, resident_rows: int, cache_bytes: int) -> EngineStats:
        """这一刻的读数。"""
        return EngineStats(
            waiting,
            running,
            resident_rows,
            cache_bytes,
            self.prompt_tokens,
            self.hit_tokens,
            self.prefill_tokens,
            self.generated_tokens,
            self.prefill_calls,
            self.decode_steps,
            MappingProxyType(self.finished.copy()),
        )
