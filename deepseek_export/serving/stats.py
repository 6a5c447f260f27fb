"""引擎的计数。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        prefill_calls, decode_steps: 主模型调用的次数。
        draft_calls: 草稿模型调用的次数。
        drafts: 起草过几次，一行一步算一次。
        proposed, accepted: 第 i 个草稿提出了、接受了几次；没有草稿模型就是空的。回答在它之前结束了的不算提出。
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
    draft_calls: int
    drafts: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    finished: Mapping[str, int]


class Counters:
    """一边跑一边累计；只有引擎的线程写。

    Args:
        num_drafts: 一步至多几个草稿。
    """

    def __init__(self, num_drafts: int = 0) -> None:
        self.prompt_tokens = self.hit_tokens = self.prefill_tokens = self.generated_tokens = 0
        self.prefill_calls = self.decode_steps = self.draft_calls = self.drafts = 0
        self.proposed, self.accepted = [0] * num_drafts, [0] * num_drafts
        self.finished = dict.fromkeys(("eos", "stop", "length", "cancelled", "error"), 0)

    def gave(self, tokens: Sequence[int], drafts: Sequence[int], ended: bool) -> None:
        """一行一步给出了 ``tokens``；``ended`` 是它以结束的 token 结束，后面的草稿对不对已经无所谓。"""
        self.generated_tokens += len(tokens)
        if not drafts:
            return
        self.drafts += 1
        for at, draft in enumerate(drafts[: len(tokens)] if ended else drafts):
            self.proposed[at] += 1
            self.accepted[at] += at < len(tokens) and tokens[at] == draft

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
            self.draft_calls,
            self.drafts,
            tuple(self.proposed),
            tuple(self.accepted),
            MappingProxyType(self.finished.copy()),
        )
