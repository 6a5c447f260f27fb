"""服务引擎的参数。"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession


@dataclass(frozen=True)
class EngineSettings:
    """构造时校验各项自己的取值；与模型合不合，由 :meth:`fitted` 校验。

    Args:
        slots: 至多几个请求同时生成。
        rows: 缓存一共几行，不小于 ``slots``；多出来的只用来留住结束了的前缀。``None`` 与 ``slots`` 相同。
        context: 一行（提示词加新 token）至多几个 token；``None`` 由模型与后端决定。
        queue: 至多几个请求排队，还没开始的都算。
        prefill_tokens: 一步里至多算几个提示词的 token；别人的两个 token 之间至多插进这么多。后端一块取不了这么多就取它的。
        prefix_reuse: 用不用别的行里现成的前缀。
        cache_bytes: 缓存至多占多少字节，按每行都到 ``context`` 算；``None`` 不限。

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

    def __post_init__(self) -> None:
        for key in ("slots", "queue", "prefill_tokens"):
            _check_whole(key, getattr(self, key))
        for key in ("rows", "context", "cache_bytes"):
            if getattr(self, key) is not None:
                _check_whole(key, getattr(self, key))
        if self.rows is not None and self.rows < self.slots:
            raise refused("rows", self.rows, f"不小于 slots={self.slots} 的整数")

    def fitted(self, session: ModelSession) -> FittedSettings:
        """照着模型与后端定下没有给的各项。

        Raises:
            DsxError: ``DSX-E532``，``slots`` 超过后端一次的行数，``context`` 超过模型的长度，或放不进 ``cache_bytes``。
        """
        limits, rows = session.limits, self.rows or self.slots
        if limits.max_batch is not None and self.slots > limits.max_batch:
            raise refused("slots", self.slots, f"不超过 {limits.max_batch} 的整数：这个引擎一次至多这么多行")
        context = self.context or session.max_positions
        if context > session.max_positions:
            raise refused("context", context, f"不超过 {session.max_positions} 的整数：模型只有这么长")
        per_row = context * session.runner.contract.caches.bytes_per_token
        if self.cache_bytes is not None and rows * per_row > self.cache_bytes:
            what = f"不小于 {rows * per_row} 的整数：{rows} 行，每行 {context} 个 token，各 {per_row} 字节；或减小 rows、context"
            raise refused("cache_bytes", self.cache_bytes, what)
        chunk = min(self.prefill_tokens, limits.prefill_chunk)
        return FittedSettings(self.slots, rows, context, self.queue, chunk, self.prefix_reuse)


@dataclass(frozen=True)
class FittedSettings:
    """含义同 :class:`EngineSettings`，各项都定下了。"""

    slots: int
    rows: int
    context: int
    queue: int
    prefill_tokens: int
    prefix_reuse: bool


def refused(key: str, value: object, allowed: str) -> DsxError:
    """服务引擎的参数不在允许范围内（``DSX-E532``）。"""
    return DsxError("DSX-E532", f"{key}={value!r}", f"把 {key} 设为{allowed}")


def _check_whole(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refused(key, value, "不小于 1 的整数")
