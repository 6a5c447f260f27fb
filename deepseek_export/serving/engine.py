"""服务引擎：一个线程握着会话，别的线程提交请求、收 token。"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Literal

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession, SamplingParams
from deepseek_export.runtime.generate import check_positive, checked_prompt
from deepseek_export.runtime.sampling import RowSampler
from deepseek_export.serving.request import Request, Work
from deepseek_export.serving.scheduler import Scheduler
from deepseek_export.serving.settings import EngineSettings, refused
from deepseek_export.serving.stats import EngineStats

_DRAFTS_UNUSED = "bundle 带草稿模型，服务引擎不用它：逐个 token 解码"


class Engine:
    """同时服务许多请求；每个请求得到的 token 与它单独跑的相同。用完要 :meth:`close`，也可以写成 ``with``。

    Args:
        session: 加载好的主模型；引擎关闭之前，别处不要用它。
        eos_token_ids: 任何一个都结束一个请求。
        settings: 参数，缺省都用缺省值。

    Raises:
        DsxError: ``DSX-E532``，参数与模型、后端不合；``DSX-E919``，TensorRT 引擎的 T 使一行没有对齐。
    """

    def __init__(
        self, session: ModelSession, eos_token_ids: Iterable[int], settings: EngineSettings | None = None
    ) -> None:
        self.settings = (settings or EngineSettings()).fitted(session)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._session = session
        self._scheduler = Scheduler(session, self.settings)
        self._inbox: deque[Request] = deque()
        self._changed = threading.Condition()  # 守着 _inbox、_cancelling、_closing
        self._cancelling = False
        self._closing: Literal["", "drain", "abort"] = ""
        self._crash: BaseException | None = None
        # 忘了关的引擎不拦着进程退出。
        self._thread = threading.Thread(target=self._serve, name="dsx-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int,
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        cache_salt: str = "",
        listener: Callable[[Request], None] | None = None,
    ) -> Request:
        """交上一个请求，立刻返回；哪个线程都可以。

        Args:
            prompt_ids: 提示词。
            sampling: 采样参数，缺省为贪心；种子就是这个请求的种子。
            max_new_tokens: 至多生成几个；提示词加新 token 不超过 ``context``。
            stop_token_ids: 另外遇到这些也停。
            ignore_eos: 遇到 eos 也不停。
            cache_salt: 只与同样的 ``cache_salt`` 共用前缀，一家一个。
            listener: 见 :class:`Request`。

        Raises:
            DsxError: ``DSX-E510``、``DSX-E511``、``DSX-E509``，提示词为空、过长、token id 越界；``DSX-E512``，``max_new_tokens`` 不是
                正整数；``DSX-E532``，``cache_salt`` 不是字符串；``DSX-E530``，排队的满了；``DSX-E531``，引擎已经停了。
        """
        check_positive("max_new_tokens", max_new_tokens)
        if not isinstance(cache_salt, str):
            raise refused("cache_salt", cache_salt, "字符串")
        prompt = checked_prompt(self._session, prompt_ids, "提示词", self.settings.context)
        stops = np.asarray([*stop_token_ids] or np.empty(0, np.int64))
        self._session.check_ids(stops, "stop_token_ids")
        work = Work(
            prompt=prompt.astype(np.int64),
            sampler=RowSampler(sampling or SamplingParams()),
            budget=min(max_new_tokens, self.settings.context - len(prompt)),
            eos=frozenset() if ignore_eos else self.eos_token_ids,
            stops=frozenset(stops.tolist()),
            salt=cache_salt,
        )
        request = Request(work, self._wake, listener)
        with self._changed:
            if self._closing or self._crash is not None:
                raise _stopped(self._crash)
            if self._waiting >= self.settings.queue:
                raise DsxError(
                    "DSX-E530",
                    f"已有 {self._waiting} 个请求在排队，上限是 {self.settings.queue}",
                    "过一会儿再提交",
                )
            self._inbox.append(request)
            self._changed.notify_all()
        return request

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """不再收请求，等线程结束；可以调几次，后一次可以改成不等。

        Args:
            drain: 收下了的都做完；``False`` 立刻取消。
            timeout: 至多等几秒；``None`` 一直等。

        Returns:
            线程是不是结束了。
        """
        with self._changed:
            if self._closing != "abort":
                self._closing = "drain" if drain else "abort"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # listener 里也可以关，只是等不了自己
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """收请求，而且最近一次模型调用是成功的。"""
        return not self._closing and self.failure is None

    @property
    def failure(self) -> BaseException | None:
        """为什么不健康：让引擎停下的内部错误，模型现在跑不了的原因，或最近一次模型调用的错误。"""
        last = None if self._scheduler.outdated else self._scheduler.failure
        return self._crash or self._session.runner.failure or last

    @property
    def notes(self) -> tuple[str, ...]:
        """要告诉用户的话。"""
        unused = () if self._session.verify_mode is None else (_DRAFTS_UNUSED,)
        return (*self._session.notes, *unused)

    @property
    def stats(self) -> EngineStats:
        """现在的读数。"""
        one = self._scheduler
        return one.counters.snapshot(self._waiting, one.running, one.resident_rows, one.cache_bytes)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    @property
    def _waiting(self) -> int:
        return len(self._inbox) + len(self._scheduler.waiting)

    def _wake(self) -> None:
        with self._changed:
            self._cancelling = True
            self._changed.notify_all()

    def _serve(self) -> None:
        """引擎的线程：有事就走一步，没事就等。"""
        try:
            while self._collect():
                self._guarded(self._scheduler.step)
        except BaseException as error:  # dsx 的缺陷：说得出来，不留下永远等不到的请求
            self._crash = error
        with self._changed:
            self._closing = self._closing or "abort"
            self._scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
        crash = self._crash
        self._scheduler.abandon(lambda one: one.end("cancelled") if crash is None else one.fail(crash))

    def _guarded(self, step: Callable[[], None]) -> None:
        """走一步；缓存用不了了（模型在别处，断了）不算 dsx 的缺陷，引擎照常收请求。"""
        try:
            step()
        except DsxError as error:
            self._scheduler.lose(error)

    def _collect(self) -> bool:
        """收下新的请求与取消；没有事就等。要停了为假。"""
        with self._changed:
            self._changed.wait_for(
                lambda: self._inbox or self._cancelling or self._closing or self._scheduler.busy
            )
            self._scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            cancelling, self._cancelling = self._cancelling, False
            closing = self._closing
        if cancelling:
            self._guarded(self._scheduler.sweep)
        return closing != "abort" and (self._scheduler.busy or not closing)


def _stopped(crash: BaseException | None) -> DsxError:
    what = "引擎已经关闭" if crash is None else f"引擎因为内部的错误停了：{crash!r}"
    return DsxError("DSX-E531", what, "重新建一个引擎")
