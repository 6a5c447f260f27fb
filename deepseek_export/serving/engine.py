"""服务引擎：一个线程握着会话，别的线程提交请求、收 token。"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.runtime import DraftSession, ModelSession, SamplingParams
from deepseek_export.runtime.generate import check_budget, checked_prompt
from deepseek_export.runtime.processors import row_processors
from deepseek_export.runtime.sampling import Processor, RowSampler, is_integer
from deepseek_export.serving.request import Request, Work
from deepseek_export.serving.scheduler import Scheduler
from deepseek_export.serving.settings import EngineSettings, refused
from deepseek_export.serving.slot_file import SavedSlot, read_slot, write_slot
from deepseek_export.serving.slots import SlotState, slot_refused
from deepseek_export.serving.stats import EngineStats

_Result = TypeVar("_Result")


class Engine:
    """同时服务许多请求；每个请求得到的 token 与它单独跑的相同。用完要 :meth:`close`，也可以写成 ``with``。

    Args:
        session: 加载好的主模型；引擎关闭之前，别处不要用它。
        eos_token_ids: 任何一个都结束一个请求。
        settings: 参数，缺省都用缺省值。
        drafts: 草稿模型，按顺序；有就投机，token 与没有时相同。别处也不要用它们。
        num_draft_tokens: bundle 一次至多几个草稿；0 就是有几个模块算几个。
        bundle: 服务的是哪个 bundle，manifest.json 的 sha256；不知道就不能把槽存到文件。

    Raises:
        DsxError: ``DSX-E532``，参数与模型、后端不合；``DSX-E919``，TensorRT 引擎的 T 使一行没有对齐。
    """

    def __init__(
        self,
        session: ModelSession,
        eos_token_ids: Iterable[int],
        settings: EngineSettings | None = None,
        drafts: Sequence[DraftSession] = (),
        num_draft_tokens: int = 0,
        bundle: str | None = None,
    ) -> None:
        self.settings = (settings or EngineSettings()).fitted(session, drafts, num_draft_tokens)
        self.eos_token_ids = frozenset(eos_token_ids)
        self._session, self._drafts = session, tuple(drafts)
        self._scheduler = Scheduler(session, self.settings, drafts)
        self._bundle = bundle
        self._inbox: deque[Request] = deque()
        self._errands: deque[Callable[[], None]] = deque()  # 两步之间要做的事
        self._changed = threading.Condition()  # 守着 _inbox、_errands、_cancelling、_closing
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
        processors: Sequence[Processor] = (),
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
            processors: 选 token 之前依次改 logits，在惩罚与偏置之后，例如约束输出的语法；见 :class:`~deepseek_export.runtime.sampling.Processor`。
            listener: 见 :class:`Request`。

        Raises:
            DsxError: ``DSX-E510``、``DSX-E511``、``DSX-E509``，提示词为空、过长、token id 越界；``DSX-E512``，``max_new_tokens`` 不是
                正整数或小于 ``min_tokens``；``DSX-E518``，没有 token 可选；``DSX-E532``，``cache_salt`` 不是字符串；``DSX-E530``，排队的满了；``DSX-E531``，引擎已经停了。
        """
        params = sampling or SamplingParams()
        check_budget(max_new_tokens, params.min_tokens)
        if not isinstance(cache_salt, str):
            raise refused("cache_salt", cache_salt, "字符串")
        prompt = checked_prompt(self._session, prompt_ids, "提示词", self.settings.context)
        stops = np.asarray([*stop_token_ids] or np.empty(0, np.int64))
        self._session.check_ids(stops, "stop_token_ids")
        eos = frozenset() if ignore_eos else self.eos_token_ids
        own = row_processors(params, len(prompt), eos.union(stops.tolist()), self._session)
        work = Work(
            prompt=prompt.astype(np.int64),
            sampler=RowSampler(params, processors=[*own, *processors]),
            budget=min(max_new_tokens, self.settings.context - len(prompt)),
            eos=eos,
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

    def slots(self) -> list[SlotState]:
        """每个槽（缓存的一行）现在怎样，按编号。

        Raises:
            DsxError: ``DSX-E531``，引擎已经停了。
        """
        return self._between_steps(self._scheduler.slots)

    def save_slot(self, slot: int, path: Path | str) -> tuple[int, int]:
        """把一个槽的前缀存成文件，见 :mod:`.slot_file`；正在用的，存到这一步为止。只有取出来的那一下占着引擎，写在调用方的线程里。

        Args:
            slot: 编号，见 :meth:`slots`。
            path: 写到哪里；已经有的换掉。

        Returns:
            ``(几个 token, 多少字节)``。

        Raises:
            DsxError: ``DSX-E534``，没有这个槽、空着，或引擎不知道是哪个 bundle；``DSX-E404`` / ``DSX-E405``，写不了；``DSX-E531``，引擎已经停了。
        """
        bundle = self._checked_slot(slot)
        salt, tokens, caches = self._between_steps(lambda: self._scheduler.save(slot))
        return len(tokens), write_slot(Path(path), SavedSlot(bundle, salt, tokens, caches))

    def restore_slot(self, slot: int, path: Path | str) -> tuple[int, int]:
        """:meth:`save_slot` 的逆：放进一个闲着的槽，原来在那里的前缀不要了；``cache_salt`` 照存的时候。

        Returns:
            ``(几个 token, 多少字节)``。

        Raises:
            DsxError: ``DSX-E533``，文件不能用；``DSX-E534``，没有这个槽、正有请求在用、前缀复用关着，或引擎不知道是哪个 bundle；``DSX-E531``，
                引擎已经停了。
        """
        bundle = self._checked_slot(slot)
        specs = self._scheduler.cache_specs
        saved, size = read_slot(Path(path), bundle, specs, self.settings.context)
        self._session.check_ids(saved.tokens, "tokens")
        self._between_steps(lambda: self._scheduler.restore(slot, saved.salt, saved.tokens, saved.caches))
        return len(saved.tokens), size

    def erase_slot(self, slot: int) -> int:
        """忘掉一个闲着的槽里的前缀；返回它有几个 token。

        Raises:
            DsxError: ``DSX-E534``，没有这个槽，或正有请求在用；``DSX-E531``，引擎已经停了。
        """
        self._checked_number(slot)
        return self._between_steps(lambda: self._scheduler.erase(slot))

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
        return tuple(dict.fromkeys(note for one in (self._session, *self._drafts) for note in one.notes))

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

    def _checked_number(self, slot: int) -> None:
        if not (is_integer(slot) and 0 <= slot < self.settings.rows):
            raise slot_refused(slot, f"不存在，编号是 0 到 {self.settings.rows - 1}")

    def _checked_slot(self, slot: int) -> str:
        self._checked_number(slot)
        if self._bundle is None:
            raise slot_refused(slot, "不能存、不能恢复：引擎不知道自己服务的是哪个 bundle")
        return self._bundle

    def _between_steps(self, work: Callable[[], _Result]) -> _Result:
        """在引擎的线程里、两步之间做一件事，等它做完；``listener`` 里就是当场做。"""
        if threading.current_thread() is self._thread:
            return work()
        done: Future[_Result] = Future()

        def errand() -> None:
            if self._closing == "abort" or self._crash is not None:
                done.set_exception(_stopped(self._crash))
                return
            try:
                done.set_result(work())
            except Exception as error:  # 算在要这样做的人头上
                done.set_exception(error)

        with self._changed:
            if self._closing == "abort" or self._crash is not None:
                raise _stopped(self._crash)
            self._errands.append(errand)
            self._changed.notify_all()
        return done.result()

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
            self._closing = "abort"
            self._scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
        crash = self._crash
        self._run_errands()
        self._scheduler.abandon(lambda one: one.end("cancelled") if crash is None else one.fail(crash))

    def _run_errands(self) -> None:
        if self._errands and self._scheduler.outdated:  # 存下来的不能是已经丢了的缓存
            self._guarded(self._scheduler.renew)
        while self._errands:
            self._errands.popleft()()

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
                lambda: (
                    self._inbox or self._errands or self._cancelling or self._closing or self._scheduler.busy
                )
            )
            self._scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            cancelling, self._cancelling = self._cancelling, False
            closing = self._closing
        if cancelling:
            self._guarded(self._scheduler.sweep)
        self._run_errands()
        return closing != "abort" and (self._scheduler.busy or not closing)


def _stopped(crash: BaseException | None) -> DsxError:
    what = "引擎已经关闭" if crash is None else f"引擎因为内部的错误停了：{crash!r}"
    return DsxError("DSX-E531", what, "重新建一个引擎")
