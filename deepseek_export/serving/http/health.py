"""引擎还行不行：坏了的能自己好起来，卡住了的说得出来。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from deepseek_export.errors import DsxError
from deepseek_export.serving import Engine, Request

#: 有事做而这么多秒一次模型调用也没有做完，就是卡住了；最大的模型一块提示词也到不了。
STALL_S = 300.0
#: 试跑的请求不与别人共用前缀。
_SALT = "dsx:probe"


class Pulse:
    """一个引擎的脉搏，由探针来问：没有后台的线程，没有人问就什么也不做。

    最近一次模型调用失败了的，每问一次就试跑一个请求（同时至多一个），成功了引擎就又健康：不靠别人的请求去碰运气。

    Args:
        engine: 服务引擎。
        prompt: 试跑的提示词。
        stall_s: 见 :data:`STALL_S`。
    """

    def __init__(self, engine: Engine, prompt: Sequence[int], stall_s: float = STALL_S) -> None:
        self._engine, self._prompt, self._stall_s = engine, prompt, stall_s
        self._probe: Request | None = None
        self._steps = -1
        self._busy_since: float | None = None  # 上一次问就在忙，从那时起一次也没有做完

    def try_out(self) -> Request:
        """试跑：算提示词一次，生成一次。

        Raises:
            DsxError: ``DSX-E530`` / ``DSX-E531``，排队的满了，或引擎停了。
        """
        return self._engine.submit(self._prompt, max_new_tokens=2, ignore_eos=True, cache_salt=_SALT)

    def trouble(self) -> str | None:
        """哪里不对；好好的是 ``None``。不健康的顺便试跑一个，下一次问就知道好了没有。"""
        engine = self._engine
        if not engine.healthy:
            failure = engine.failure
            if self._probe is None or self._probe.done:
                with suppress(DsxError):  # 停了的试不了；排队的满了，别人的请求就是试跑
                    self._probe = self.try_out()
            # 探针不要密钥：只说是哪一种，不说内部错误的原文。
            kind = failure.code if isinstance(failure, DsxError) else type(failure).__name__
            return "已经关闭" if failure is None else f"出错：{kind}"
        stats = engine.stats
        steps, now = stats.prefill_calls + stats.decode_steps, monotonic()
        if not stats.running:
            self._busy_since = None
        elif steps != self._steps or self._busy_since is None:
            self._busy_since = now
        self._steps = steps
        stalled = 0.0 if self._busy_since is None else now - self._busy_since
        return f"卡住了：{stalled:.0f} 秒没有做完一次模型调用" if stalled > self._stall_s else None
