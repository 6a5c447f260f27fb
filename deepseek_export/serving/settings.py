"""服务引擎的参数。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_export.errors import DsxError
from deepseek_export.runtime import DraftSession, ModelSession
from deepseek_export.runtime.speculation.generator import MAX_DRAFT_TOKENS
from deepseek_export.units import size

#: 由 ``cache_bytes`` 定的行数至多这么多。
MAX_ROWS = 4096


@dataclass(frozen=True)
class EngineSettings:
    """构造时校验各项自己的取值；与模型合不合，由 :meth:`fitted` 校验。

    Args:
        slots: 至多几个请求同时生成。
        rows: 缓存一共几行，不小于 ``slots``；多出来的只用来留住结束了的前缀。``None`` 与 ``slots`` 相同，给了 ``cache_bytes`` 就是放得下几行
            有几行，至多 :data:`MAX_ROWS` 行。
        context: 一行（提示词加新 token）至多几个 token；``None`` 由模型与后端决定。
        queue: 至多几个请求排队，还没开始的都算。
        prefill_tokens: 一步里至多算几个提示词的 token；别人的两个 token 之间至多插进这么多。后端一块取不了这么多就取它的。
        prefix_reuse: 用不用别的行里现成的前缀。
        cache_bytes: 缓存（草稿模型的也算）至多占多少字节，按每行都长到 ``context`` 所在的那一档算；``None`` 不限。
        speculation: 有草稿模型时一步至多验证几个草稿，1 到 8；``True`` 照 bundle 的，``False`` 不投机。后端一次验证不了这么多就取它的。投机不投机，
            token 都一样。
        speculation_floor: 实测投机不比普通解码快的批大小，先不投机；``False`` 一直投机。

    Raises:
        DsxError: ``DSX-E532``，取值不在允许范围内。
    """

    slots: int = 8
    rows: int | None = None
    context: int | None = None
    queue: int = 256
    prefill_tokens: int = 128
    prefix_reuse: bool = True
    cache_bytes: int | None = None
    speculation: bool | int = True
    speculation_floor: bool = True

    def __post_init__(self) -> None:
        for key in ("slots", "queue", "prefill_tokens"):
            _check_whole(key, getattr(self, key))
        for key in ("rows", "context", "cache_bytes"):
            if getattr(self, key) is not None:
                _check_whole(key, getattr(self, key))
        if self.rows is not None and self.rows < self.slots:
            raise refused("rows", self.rows, f"不小于 slots={self.slots} 的整数")
        whole = isinstance(self.speculation, int) and 0 <= self.speculation <= MAX_DRAFT_TOKENS
        if not whole or (self.speculation == 0 and self.speculation is not False):
            raise refused("speculation", self.speculation, f" 1 到 {MAX_DRAFT_TOKENS} 的整数、True 或 False")

    def fitted(
        self, session: ModelSession, drafts: Sequence[DraftSession] = (), num_draft_tokens: int = 0
    ) -> FittedSettings:
        """照着模型与后端定下没有给的各项。

        Args:
            session: 主模型。
            drafts: 草稿模型，可以没有。
            num_draft_tokens: bundle 一次至多几个草稿；0 就是有几个模块算几个。

        Raises:
            DsxError: ``DSX-E532``，``slots`` 超过后端一次的行数，``context`` 超过模型的长度，或放不进 ``cache_bytes``。
        """
        most = num_draft_tokens or len(drafts)
        most = most if self.speculation is True else int(self.speculation)
        used = drafts[: most if drafts else 0]
        graphs = (session, *used)
        largest = min(
            (one.limits.max_batch for one in graphs if one.limits.max_batch is not None), default=None
        )
        if largest is not None and self.slots > largest:
            raise refused("slots", self.slots, f"不超过 {largest} 的整数：这个引擎一次至多这么多行")
        positions = min(one.max_positions for one in graphs)
        context = self.context or positions
        if context > positions:
            raise refused("context", context, f"不超过 {positions} 的整数：模型只有这么长")
        per_row = sum(
            one.limits.capacity(context) * one.runner.contract.caches.bytes_per_token for one in graphs
        )
        rows = self._rows(context, per_row)
        widest = min(one.limits.prefill_chunk for one in graphs)
        chunk = min(self.prefill_tokens, widest)
        if used:
            # 一次验证 K + 1 个位置，一次起草还要多走模块数减一个。
            most = min(most, (session.limits.logits_rows or most + 1) - 1, widest - len(used))
        num_drafts = max(most, 0) if used else 0
        return FittedSettings(
            self.slots,
            rows,
            context,
            self.queue,
            chunk,
            self.prefix_reuse,
            num_drafts,
            self.speculation_floor,
        )

    def _rows(self, context: int, per_row: int) -> int:
        """缓存开几行；一行到头是 ``context`` 个位置、``per_row`` 字节。"""
        rows = self.rows or self.slots
        if self.cache_bytes is None:
            return rows
        if rows * per_row > self.cache_bytes:
            what = (
                f"不小于 {rows * per_row}（{size(rows * per_row)}）的整数：{rows} 行，每行放得下 {context} 个 token，"
                f"各 {per_row} 字节；或减小 slots（rows）、context"
            )
            raise refused("cache_bytes", self.cache_bytes, what)
        return self.rows or min(self.cache_bytes // per_row, max(rows, MAX_ROWS))


@dataclass(frozen=True)
class FittedSettings:
    """含义同 :class:`EngineSettings`，各项都定下了。

    Attributes:
        num_drafts: 一步至多验证几个草稿；0 就是不投机。
    """

    slots: int
    rows: int
    context: int
    queue: int
    prefill_tokens: int
    prefix_reuse: bool
    num_drafts: int
    speculation_floor: bool


def refused(key: str, value: object, allowed: str) -> DsxError:
    """服务引擎的参数不在允许范围内（``DSX-E532``）。"""
    return DsxError("DSX-E532", f"{key}={value!r}", f"把 {key} 设为{allowed}")


def _check_whole(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refused(key, value, "不小于 1 的整数")
