"""按写好的剧本往服务引擎里送请求：什么时候到、什么时候取消，都以给出过几个 token 计，所以每次都一样。"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from deepseek_export.parity.tolerances import Dtype, token_margin
from deepseek_export.runtime import DraftSession, Generator, ModelSession, SamplingParams
from deepseek_export.runtime.randomness import RowStream, Use
from deepseek_export.runtime.sampling import candidates
from deepseek_export.serving import Engine, EngineSettings, Request


@dataclass(frozen=True)
class Ask:
    """一个请求。

    Attributes:
        prompt, budget, sampling, stops, salt: 要什么。
        arrives: 全部请求一共给出这么多 token 之后到；引擎闲着就提前到。
        cancels: 自己给出这么多 token 之后取消；``None`` 不取消。
    """

    prompt: list[int]
    budget: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    arrives: int = 0
    cancels: int | None = None
    stops: tuple[int, ...] = ()
    ignore_eos: bool = False
    salt: str = ""


class Play:
    """演一遍。

    Args:
        engine: 引擎。
        asks: 全部请求。

    Attributes:
        requests: 与 ``asks`` 同序，演完之后都有。
    """

    def __init__(self, engine: Engine, asks: list[Ask]) -> None:
        self._engine, self._asks = engine, asks
        self._order = sorted(range(len(asks)), key=lambda index: asks[index].arrives)
        self._given = self._open = 0
        self._heard_of: dict[int, int] = {}  # 每个请求听到过几个 token
        self._sent: SimpleQueue[Request] = SimpleQueue()
        self._lock = threading.RLock()  # 头一个由调用方的线程送，其余的由引擎的线程送
        self.requests: dict[int, Request] = {}

    def run(self) -> list[Request]:
        """送完，等全部结束。"""
        with self._lock:
            self._send()
        for _ in self._asks:
            list(self._sent.get(timeout=60))
        return [self.requests[index] for index in range(len(self._asks))]

    def _send(self) -> None:
        ask = self._asks[index := self._order[len(self.requests)]]
        self._open += 1
        self.requests[index] = self._engine.submit(
            ask.prompt,
            ask.sampling,
            max_new_tokens=ask.budget,
            stop_token_ids=ask.stops,
            ignore_eos=ask.ignore_eos,
            cache_salt=ask.salt,
            listener=lambda request: self._heard(request, ask, index),
        )
        self._sent.put(self.requests[index])

    def _heard(self, request: Request, ask: Ask, index: int) -> None:
        with self._lock:
            self._next(request, ask, index)

    def _next(self, request: Request, ask: Ask, index: int) -> None:
        count = len(request.token_ids)
        self._given += count - self._heard_of.get(index, 0)
        self._heard_of[index] = count
        self._open -= request.done
        if ask.cancels is not None and count >= ask.cancels and not (request.done or request.cancelled):
            request.cancel()
        while len(self.requests) < len(self._asks):
            due = self._asks[self._order[len(self.requests)]].arrives <= self._given
            if not due and self._open:
                break
            self._send()


def alone(session: ModelSession, eos: tuple[int, ...], ask: Ask) -> list[int]:
    """同一个请求由生成器单独跑。"""
    generator = Generator(session, None, eos)
    (ids,) = generator.generate([ask.prompt], ask.budget, ask.sampling, ignore_eos=ask.ignore_eos).token_ids
    ends = [at for at, token in enumerate(ids, 1) if token in ask.stops]
    return ids[: ends[0]] if ends else ids


def assert_same_tokens(
    session: ModelSession, ask: Ask, got: list[int], want: list[int], dtype: Dtype
) -> None:
    """SERVE-1：逐 token 相同；头一个不同的只能是近平局：logits 在 ``dtype`` 的容差之内变一变，选的就是另一个。"""
    at = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        assert got == want, ask
        return
    (logits,) = Generator(session, None, ()).logits([[*ask.prompt, *want[:at]]])
    scores = logits[-1].astype(np.float64)
    margin = token_margin(("logits", dtype, None), float(np.sqrt(np.mean(scores**2))))
    if ask.sampling.greedy:
        assert scores.max() - scores[got[at]] <= margin, (ask, at)
        return
    ids, probs = candidates(scores, ask.sampling)
    ends = np.cumsum(probs)
    (aim,) = RowStream(ask.sampling.seed).uniforms(Use.NEXT, len(ask.prompt) + at)
    (place,) = np.flatnonzero(ids == got[at])
    away = max(ends[place] - probs[place] - aim, aim - ends[place])
    assert away <= margin / ask.sampling.temperature, (ask, at)


def assert_same_as_alone(
    session: ModelSession,
    eos: tuple[int, ...],
    asks: list[Ask],
    settings: EngineSettings,
    dtype: Dtype = "float32",
    drafts: Sequence[DraftSession] = (),
    num_draft_tokens: int = 0,
) -> Engine:
    """每个请求的 token 都与（不投机的生成器）单独跑的相同，取消了的是它的开头；返回关了的引擎。

    Args:
        session: 主模型。
        eos: 结束符。
        asks: 剧本。
        settings: 引擎的参数。
        dtype: 近平局照哪一行容差判，见 :func:`assert_same_tokens`。
        drafts: 草稿模型。
        num_draft_tokens: 至多几个草稿。
    """
    wanted = [alone(session, eos, ask) for ask in asks]
    with Engine(session, eos, settings, drafts, num_draft_tokens) as engine:
        requests = Play(engine, asks).run()
    for ask, request, want in zip(asks, requests, wanted, strict=True):
        result = request.result()
        if result.reason == "cancelled":
            assert ask.cancels is not None
            assert len(result.token_ids) <= ask.cancels + 1 + engine.settings.num_drafts
            want = want[: len(result.token_ids)]
        assert_same_tokens(session, ask, result.token_ids, want, dtype)
        assert result.cached_tokens < len(ask.prompt)
    stats = engine.stats
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.finished.values()) == len(asks)
    assert stats.hit_tokens == sum(request.cached_tokens for request in requests)
    return engine
