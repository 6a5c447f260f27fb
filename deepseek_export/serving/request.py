"""一个请求：要什么、给出的 token 流、结果；调用方的线程与引擎的线程之间只隔着它。"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from deepseek_export.history import History
from deepseek_export.runtime.logprobs import TokenLogprobs
from deepseek_export.runtime.sampling import RowSampler

#: ``eos`` 模型的结束符；``stop`` 请求自己的停止 token；``length`` 到了上限；``cancelled`` 取消了。
EndReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True)
class Work:
    """要做的事，提交之后不变。

    Attributes:
        prompt: ``[n]`` int64，核对过的提示词。
        sampler: 怎么选 token。
        budget: 至多几个新 token，已把最大长度算在内，可以为 0。
        eos, stops: 遇到哪些 token 结束；结束的那个也算在输出里。
        salt: 只与同样 ``salt`` 的请求共用前缀。
    """

    prompt: np.ndarray
    sampler: RowSampler
    budget: int
    eos: frozenset[int]
    stops: frozenset[int]
    salt: str


@dataclass(frozen=True)
class Timeline:
    """各时刻，``time.perf_counter`` 的秒数；没有到过的为 ``None``。

    Attributes:
        submitted: 提交。
        started: 离开队列，开始算提示词。
        first_token: 给出第一个 token。
        finished: 结束。
    """

    submitted: float
    started: float | None
    first_token: float | None
    finished: float | None


@dataclass(frozen=True)
class RequestResult:
    """一个请求的结果。

    Attributes:
        token_ids: 新 token，含结束的那个，不含提示词。
        reason: 为什么结束。
        prompt_tokens: 提示词的长度。
        cached_tokens: 其中有几个的缓存是现成的，没有重算。
        timeline: 各时刻。
        logprobs: 每个新 token 的对数概率，与 ``token_ids`` 对应；没有要就是 ``None``。
    """

    token_ids: list[int]
    reason: EndReason
    prompt_tokens: int
    cached_tokens: int
    timeline: Timeline
    logprobs: list[TokenLogprobs] | None = None


class Request:
    """由 :meth:`Engine.submit` 给出；逐个迭代得到 token，哪个线程里都行，迭代几次都从头给。

    Args:
        work: 要做的事。
        wake: 取消时叫醒引擎。
        listener: 每一步有了新 token（投机时可以不止一个）、以及结束时，在引擎的线程里调一次 ``listener(request)``；要立刻返回。它抛出的异常算
            这个请求的失败。
    """

    def __init__(
        self,
        work: Work,
        wake: Callable[[], None],
        listener: Callable[[Request], None] | None = None,
    ) -> None:
        self.work = work
        self.cached_tokens = 0
        self._wake, self._listener = wake, listener
        lock = threading.Lock()
        # 同一把锁，两种等：等结束的不必每个 token 都醒一次，醒来要与引擎争解释器的锁。
        self._news, self._over = threading.Condition(lock), threading.Condition(lock)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._history: History | None = None  # 只有处理器要看，第一次看时才抄提示词
        self._reason: EndReason | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._submitted = perf_counter()
        self._started: float | None = None
        self._first: float | None = None
        self._finished: float | None = None

    @property
    def done(self) -> bool:
        """结束了没有，失败也算。"""
        return self._reason is not None or self._error is not None

    @property
    def outcome(self) -> str:
        """怎么结束的：:data:`EndReason` 之一，失败是 ``error``；还没有结束是空串。"""
        return "error" if self._error is not None else self._reason or ""

    @property
    def cancelled(self) -> bool:
        """有没有人要取消。"""
        return self._cancelled

    @property
    def token_ids(self) -> list[int]:
        """到现在为止的新 token，一份复制。"""
        return self._tokens.copy()

    @property
    def length(self) -> int:
        """提示词加到现在为止的新 token 一共几个。"""
        return len(self.work.prompt) + len(self._tokens)

    @property
    def remaining(self) -> int:
        """至多还能给出几个。"""
        return self.work.budget - len(self._tokens)

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """到现在为止各个新 token 的对数概率，一份复制；没有要就是 ``None``。"""
        return None if self.work.sampler.params.logprobs is None else self._logprobs.copy()

    def tokens_since(self, taken: int) -> list[int]:
        """第 ``taken`` 个起的新 token，一份复制。"""
        return self._tokens[taken:]

    def logprobs_since(self, taken: int) -> list[TokenLogprobs] | None:
        """第 ``taken`` 个起的新 token 的对数概率，一份复制；没有要就是 ``None``。"""
        return None if self.work.sampler.params.logprobs is None else self._logprobs[taken:]

    def __iter__(self) -> Iterator[int]:
        taken, over = 0, False
        while not over:
            with self._news:
                while len(self._tokens) == taken and not self.done:
                    self._news.wait()
                fresh, over = self._tokens[taken:], self.done
            yield from fresh
            taken += len(fresh)
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> RequestResult:
        """等它结束。

        Args:
            timeout: 至多等几秒；``None`` 一直等。

        Raises:
            TimeoutError: 到时还没有结束；请求照旧进行。
            DsxError: 这个请求失败的原因，例如后端的错误。
        """
        with self._over:
            if not self._over.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"{timeout} 秒内没有结束")
        if self._error is not None or self._reason is None:
            raise self._error or ValueError("没有结束的原因")
        timeline = Timeline(self._submitted, self._started, self._first, self._finished)
        return RequestResult(
            self.token_ids,
            self._reason,
            len(self.work.prompt),
            self.cached_tokens,
            timeline,
            self.logprobs,
        )

    def cancel(self) -> None:
        """不再要了；至多再走完正在走的那一步，已经给出的 token 仍在。结束了的不受影响。"""
        self._cancelled = True
        self._wake()

    # 下面几个只在引擎的线程里用。

    @property
    def history(self) -> History:
        """提示词加到现在为止的新 token；总是同一个，末尾可能有草稿。"""
        if self._history is None:
            self._history = History(self.work.prompt.tolist())
            self._history.confirm(self._tokens)
        return self._history

    @property
    def sequence(self) -> np.ndarray:
        """``[n]`` int64，提示词加到现在为止的新 token，一份复制；请求离开时才要，不是每步。"""
        return np.concatenate([self.work.prompt, np.array(self._tokens, np.int64)])

    def start(self, cached_tokens: int) -> None:
        """离开队列。"""
        self._started, self.cached_tokens = perf_counter(), cached_tokens

    def ends_with(self, token: int) -> bool:
        """``token`` 是不是结束的那个。"""
        return token in self.work.eos or token in self.work.stops

    def emit(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """给出一步的 token，至少一个，至多 :attr:`remaining` 个；只有最后一个可以是结束的那个。要对数概率的，连同每个 token 的。"""
        with self._news:
            self._logprobs.extend(logprobs)
            self._tokens.extend(tokens)
            if self._history is not None:
                self._history.confirm(tokens)
            if self._first is None:
                self._first = perf_counter()
            if tokens[-1] in self.work.eos:
                self._reason = "eos"
            elif tokens[-1] in self.work.stops:
                self._reason = "stop"
            elif self.remaining <= 0:
                self._reason = "length"
            self._settle()
        self._tell()

    def end(self, reason: EndReason) -> None:
        """没有新 token 就结束；已经结束的不变。"""
        with self._news:
            if self.done:
                return
            self._reason = reason
            self._settle()
        self._tell()

    def fail(self, error: BaseException) -> None:
        """失败；已经结束的不变。"""
        with self._news:
            if self.done:
                return
            self._error = error
            self._settle()
        self._tell()

    def _settle(self) -> None:
        if self.done:
            self._finished = perf_counter()
            self._over.notify_all()
        self._news.notify_all()

    def _tell(self) -> None:
        if self._listener is None:
            return
        try:
            self._listener(self)
        except Exception as error:  # 别人的代码；不能连累同批的请求
            self._listener = None
            self.fail(error)
