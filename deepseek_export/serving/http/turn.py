"""一次 HTTP 请求要的几个回答：交给服务引擎，在事件循环里等它们的文本。引擎的线程与事件循环只在这里相接。"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from deepseek_export.formats.calls import CallDelta
from deepseek_export.formats.grammar import Grammar
from deepseek_export.runtime import BundleTokenizer, SamplingParams
from deepseek_export.runtime.sampling import Processor
from deepseek_export.runtime.stop import StopStrings
from deepseek_export.serving import Engine, Request
from deepseek_export.serving.http.formats import Reading
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.reasoning import Parts, ReasoningSplit
from deepseek_export.serving.http.scores import ScoredToken
from deepseek_export.serving.http.waking import waker_of

#: OpenAI 的 ``finish_reason``。
FinishReason = Literal["stop", "length", "tool_calls"]

_REASONS: MappingProxyType[str, FinishReason] = MappingProxyType(
    {"eos": "stop", "stop": "stop", "length": "length"}
)


class ClientGoneError(Exception):
    """客户端走了，回答没有人收。"""


@dataclass(frozen=True)
class Order:
    """要一个回答。

    Attributes:
        prompt: 提示词的 token id。
        sampling: 采样参数。
        max_new_tokens: 至多几个新 token。
        stops: 停止串。
        stop_token_ids: 另外遇到这些也停，它们不算进文本。
        ignore_eos: 遇到 eos 也不停。
        cache_salt: 只与同样的 ``cache_salt`` 共用前缀。
        copy: 同一条提示词的第几个回答。
        reading: 思考、工具调用怎么分出来；``None`` 不分（不是对话）。
        grammar: 约束输出的语法。
        echo: 放在文本最前面的，里面不找停止串。
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    max_new_tokens: int
    stops: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    cache_salt: str = ""
    copy: int = 0
    reading: Reading | None = None
    grammar: Grammar | None = None
    echo: str = ""


@dataclass(frozen=True)
class Piece:
    """一个回答新来的一段。

    Attributes:
        index: 第几个回答。
        text: 新的文本，可能为空串。
        reasoning: 新的思考，可能为空串。
        tokens: 这一段用了几个 token。
        waited: 离上一段（头一段是离提交）几秒。
        first: 是不是头一段有 token 的。
        finish: 结束了就是原因。
        calls: 新的工具调用的碎片，头一段带着 id。
        scores: 这一段文本里的 token 的对数概率；没有要就是 ``None``。文本还攥着的 token，留到给出文本的那一段。
    """

    index: int
    text: str
    reasoning: str
    tokens: int
    waited: float
    first: bool
    finish: FinishReason | None
    calls: tuple[CallDelta, ...] = ()
    scores: tuple[ScoredToken, ...] | None = None


class Choice:
    """一个回答：token 变成文本，找停止串，分出思考与调用，记下为什么结束。

    Attributes:
        tokens, reasoning_tokens: 用了几个 token，其中几个在思考。
        finish: 结束的原因；没有结束是 ``None``。
        stopped_by: 停在哪个停止串；不是停止串就是 ``None``。
    """

    def __init__(self, index: int, order: Order, tokenizer: BundleTokenizer) -> None:
        self.index, self.order = index, order
        self.tokens = 0
        self.finish: FinishReason | None = None
        self.request: Request | None = None
        self.stopped_by: str | None = None
        self._reading = order.reading
        self._kept = () if order.reading is None else order.reading.kept
        self._tokenizer, self._stream = tokenizer, tokenizer.stream(self._kept)
        self._stops, self._silent = StopStrings(order.stops), frozenset(order.stop_token_ids)
        self._split = None if order.reading is None else ReasoningSplit(order.reading.begun)
        self._parser = None if order.reading is None else order.reading.parser()
        self._called = False
        self._parts = Parts("", "")
        self.reasoning_tokens = 0
        self._constraint = None if order.grammar is None else order.grammar.processor(len(order.prompt))
        self._ids: list[int] = []
        self._shown: list[str] = []  # 流式解码器给出了的各段，与它们的字符数
        self._decoded = 0
        self._given = 0  # 找过停止串、给出了的字符数
        self._scores: list[ScoredToken] = []  # 文本还攥着的 token
        self._latest = perf_counter()

    @property
    def processors(self) -> list[Processor]:
        """交给引擎的。"""
        return [] if self._constraint is None else [self._constraint]

    def advance(self) -> Piece | None:
        """收下新来的 token；没有新的、也没有结束就是 ``None``。

        Raises:
            DsxError: 这个请求失败的原因。
            ApiError: 503，服务要停，没有做完。
        """
        assert self.request is not None
        done = self.request.done  # 先看结束没有，再取 token：反过来会漏掉中间来的
        fresh = self.request.tokens_since(self.tokens)
        if not fresh and not done:
            return None
        now, before = perf_counter(), self.tokens
        logprobs = self.request.logprobs_since(before)  # 先取的 token，这里一个也不少
        waited, self._latest = now - self._latest, now
        for token in fresh:
            if logprobs is not None and self._visible(token):
                offset = len(self.order.echo) + self._decoded
                scored = ScoredToken.of(logprobs[self.tokens - before], self._tokenizer.bytes_of, offset)
                self._scores.append(scored)
            self.tokens += 1
            self._part(self._feed(token))
            if self._split is not None and self._split.thinking:
                self.reasoning_tokens += 1
            if self._stops.stopped:
                self.finish, self.stopped_by = "stop", self._stops.found
                self.request.cancel()
                break
        if done and self.finish is None:
            reason = self.request.result(timeout=0).reason
            if reason not in _REASONS:
                raise ApiError(503, "服务正在停止，这个请求没有做完", code="shutting_down")
            if self._constraint is not None:
                failure = self._constraint.failure(self.request.token_ids)
                if failure is not None:
                    raise failure
            self.finish = _REASONS[reason]
            self._part(self._rest())
        if self.finish is not None and self._split is not None:
            self._parts = _joined(self._parts, self._split.flush())
        scores = None if logprobs is None else self._released()
        (reasoning, text), self._parts = self._parts, Parts("", "")
        text, calls = self._calls(text)
        first = before == 0 < self.tokens
        if before == 0:
            text = self.order.echo + text
        new = self.tokens - before
        return Piece(self.index, text, reasoning, new, waited, first, self.finish, calls, scores)

    def _visible(self, token: int) -> bool:
        """不是结束的 token：那些不在文本里。"""
        assert self.request is not None
        return token not in self._silent and token not in self.request.work.eos

    def _released(self) -> tuple[ScoredToken, ...]:
        """文本已经给出的 token；停在停止串上的，停止串里的都不要。"""
        end = len(self.order.echo) + self._given
        ended = self.finish is not None and not self._stops.stopped
        count = sum(ended or one.offset < end for one in self._scores)
        released, self._scores = tuple(self._scores[:count]), self._scores[count:]
        return released

    def _feed(self, token: int) -> str:
        if token in self._silent:
            return ""
        self._ids.append(token)
        piece = self._stream.step(token)
        self._shown.append(piece)
        self._decoded += len(piece)
        if self.tokens <= self.order.sampling.min_tokens:
            return piece
        return self._stops.feed(piece)

    def _part(self, text: str) -> None:
        """分出思考与答案，攒在一起。"""
        self._given += len(text)
        parts = Parts("", text) if self._split is None else self._split.feed(text)
        self._parts = _joined(self._parts, parts)

    def _calls(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        """正文与调用的碎片；只许一次的，头一次完了就停。"""
        if self._parser is None:
            return text, ()
        parsed = [self._parser.feed(text)]
        if self.finish is not None:
            parsed.append(self._parser.flush())
        calls = [delta for one in parsed for delta in one.calls]
        if self._reading is not None and self._reading.single:
            over = any(delta.done for delta in calls)
            calls = [delta for delta in calls if delta.index == 0]
            if over and self.finish is None and self.request is not None:
                self.finish = "stop"
                self.request.cancel()
        self._called = self._called or bool(calls)
        if self._called and self.finish == "stop":
            self.finish = "tool_calls"
        return "".join(one.content for one in parsed), tuple(map(_with_id, calls))

    def _rest(self) -> str:
        """流式解码器还攥着的半个字符，与可能是停止串开头的那几个字。"""
        whole, shown = self._tokenizer.decode(self._ids, self._kept), "".join(self._shown)
        rest = whole[len(shown) :] if whole.startswith(shown) else ""
        text = self._stops.feed(rest)
        if self._stops.stopped:
            self.finish, self.stopped_by = "stop", self._stops.found
        return text + self._stops.flush()


def _joined(one: Parts, another: Parts) -> Parts:
    return Parts(one.reasoning + another.reasoning, one.content + another.content)


def _with_id(delta: CallDelta) -> CallDelta:
    """调用的头一段要有 id；文本里没有的，给一个。"""
    if delta.name is None or delta.id is not None:
        return delta
    return replace(delta, id=f"call_{secrets.token_hex(12)}")


class Turn:
    """几个回答一起等；要写成 ``with``，离开时没有做完的都取消，不管是怎么离开的。

    Args:
        engine: 服务引擎。
        tokenizer: 解码用。
        orders: 每个回答一份。

    Attributes:
        choices: 各个回答。

    Raises:
        DsxError: ``DSX-E512``，停止串不对。
    """

    def __init__(self, engine: Engine, tokenizer: BundleTokenizer, orders: Sequence[Order]) -> None:
        self.choices = [Choice(index, order, tokenizer) for index, order in enumerate(orders)]
        self._engine = engine
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._waker = waker_of(self._loop)
        self._gone = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """没有做完的都不要了；做完了的不受影响。"""
        for choice in self.choices:
            if choice.request is not None:
                choice.request.cancel()

    def submit(self) -> None:
        """全部交给引擎；有一个收不下，前面的也不要了。

        Raises:
            DsxError: 见 :meth:`~deepseek_export.serving.Engine.submit`。
        """
        try:
            for choice in self.choices:
                order = choice.order
                choice.request = self._engine.submit(
                    order.prompt,
                    order.sampling,
                    max_new_tokens=order.max_new_tokens,
                    stop_token_ids=order.stop_token_ids,
                    ignore_eos=order.ignore_eos,
                    cache_salt=order.cache_salt,
                    processors=choice.processors,
                    listener=self._tell,
                )
        except BaseException:
            self.cancel()
            raise

    async def pieces(self, idle_s: float | None = None) -> AsyncIterator[Piece | None]:
        """各个回答的各段，先来先给；``idle_s`` 秒没有动静就给一个 ``None``。

        Raises:
            DsxError: 有一个请求失败了。
            ApiError: 503，服务要停。
            ClientGoneError: 客户端走了。
        """
        waiting = list(self.choices)
        while waiting:
            try:
                async with asyncio.timeout(idle_s):
                    await self._news.wait()
            except TimeoutError:
                yield None
                continue
            self._news.clear()
            if self._gone:
                raise ClientGoneError
            for choice in waiting:
                if (piece := choice.advance()) is not None:
                    yield piece
            waiting = [choice for choice in waiting if choice.finish is None]

    def abandon(self) -> None:
        """客户端走了；在事件循环里调。"""
        self._gone = True
        self._news.set()

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI 的 ``usage``：一条提示词要几个回答，也只算一次。"""
        prompts = [choice for choice in self.choices if choice.order.copy == 0]
        prompt = sum(len(choice.order.prompt) for choice in prompts)
        cached = sum(0 if one.request is None else one.request.cached_tokens for one in prompts)
        completion = sum(choice.tokens for choice in self.choices)
        thought = sum(choice.reasoning_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
            # DeepSeek 自己的 API 的名字，算价钱的客户端读它们。
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }

    def _tell(self, request: Request) -> None:
        """在引擎的线程里调；服务停得急，事件循环可能已经关了，那时没有人要听。"""
        self._waker.set(self._loop, self._news)
