"""一步一步地跑：谁开始、谁算提示词、谁生成。没有线程，也不等待；线程与排队的上限在 :mod:`.engine`。

一步至多两次主模型调用：给正在加入的那个请求算一块提示词（至多 ``prefill_tokens`` 个 token，只有它那一行），再给正在生成的各行各走
一步：一个 token，或起草了就验证几个。所以不管来了多长的提示词，别人的两个 token 之间至多插进一块。一块怎么切只看这个请求自己。
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from deepseek_export.backend.base import SavedRow
from deepseek_export.backend.contract import CacheSpec
from deepseek_export.errors import DsxError
from deepseek_export.runtime import DraftSession, ModelSession
from deepseek_export.runtime.logprobs import TokenLogprobs, token_logprobs
from deepseek_export.runtime.speculation.batch_floor import BatchFloor
from deepseek_export.serving.accept import accepted, drafting, ragged
from deepseek_export.serving.forward import Forward, Step
from deepseek_export.serving.request import Request
from deepseek_export.serving.rows import Held, RowTable
from deepseek_export.serving.settings import FittedSettings
from deepseek_export.serving.slots import SlotState, slot_refused
from deepseek_export.serving.stats import Counters


@dataclass
class _Joining:
    """正在算提示词的请求。"""

    request: Request
    held: Held


class Scheduler:
    """全部的状态；只能在一个线程里用，``waiting`` 只许别的线程往后添。

    Args:
        session: 主模型。
        settings: 定下了的参数。
        drafts: 草稿模型。

    Attributes:
        waiting: 排队的请求，先来先走。
        counters: 累计。
        failure: 最近一次模型调用为什么失败；成功一次就是 ``None``。

    Raises:
        DsxError: ``DSX-E919``，TensorRT 引擎的一行没有对齐，不能只运行其中一行。
    """

    def __init__(
        self, session: ModelSession, settings: FittedSettings, drafts: Sequence[DraftSession] = ()
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.counters = Counters(settings.num_drafts)
        self.failure: DsxError | None = None
        self._session, self._settings, self._drafts = session, settings, tuple(drafts)
        self._open()
        self._floor = BatchFloor() if settings.speculation_floor else None
        self._joining: _Joining | None = None
        self._running: list[Request] = []  # 第 b 个占着第 b 行
        self._newest = np.zeros(settings.rows, np.int64)  # 每行最新的 token，还没有送进模型

    def _open(self) -> None:
        """分配缓存，各行都空着。"""
        self._generation = self._session.runner.generation
        self._forward = forward = Forward(self._session, self._settings, self._drafts)
        self._table = RowTable(forward.caches, self._settings.prefix_reuse, forward.redo, forward.arrays)

    @property
    def running(self) -> int:
        """开始了、还没结束的请求数。"""
        return len(self._running) + (self._joining is not None)

    @property
    def busy(self) -> bool:
        """还有没有事可做。"""
        return bool(self.waiting) or self.running > 0

    @property
    def resident_rows(self) -> int:
        """只为前缀留着的行数。"""
        return self._table.resident

    @property
    def cache_bytes(self) -> int:
        """缓存分配的字节数。"""
        return sum(caches.nbytes for caches in self._forward.caches)

    @property
    def cache_specs(self) -> list[CacheSpec]:
        """主模型的缓存与各草稿模型的，各有哪些张量。"""
        return [caches.spec for caches in self._forward.caches]

    def step(self) -> None:
        """走一步。

        模型调用失败（``DsxError``）只算在这次调用里的请求头上，它们的行也不再留用。

        Raises:
            DsxError: 缓存搬不动，或模型断了还没有起来：接着要 :meth:`lose`。
        """
        if self.outdated:
            self.renew()
        if self._joining is None and self.waiting and self._table.active < self._settings.slots:
            self._admit(self.waiting[0])  # 缓存搬不动，它还在队里
            self.waiting.popleft()
        if self._joining is not None:
            self._prefill(self._joining)
        if self._running:
            self._decode()

    def sweep(self) -> None:
        """要取消的都结束；给出过的 token 与算好的前缀仍在。"""
        for request in [one for one in self.waiting if one.cancelled]:
            self.waiting.remove(request)
            request.end("cancelled")
            self.counters.count(request.outcome)
        joining = self._joining
        if joining is not None and joining.request.cancelled:
            joining.request.end("cancelled")
            self.counters.count(joining.request.outcome)
            self._retire(joining.held, joining.request)
            self._joining = None
        for request in self._running:
            if request.cancelled:
                request.end("cancelled")
        self._pack()

    def slots(self) -> list[SlotState]:
        """每个槽现在怎样，按编号。"""
        found = []
        for name in range(self._settings.rows):
            row, held = self._table.named(name)
            found.append(
                SlotState(name, int(self._table.lengths[row]), held is not None and not held.finished)
            )
        return found

    def save(self, name: int) -> tuple[str, np.ndarray, tuple[SavedRow, ...]]:
        """一个槽的 ``(salt, token, 各图的缓存)``；正在用的，存到这一步为止。

        Raises:
            DsxError: ``DSX-E534``，空着。
        """
        row, held = self._table.named(name)
        length = self._forward.usable(row, int(self._table.lengths[row]))
        if held is None or length <= 0:
            raise slot_refused(name, "空着，没有可存的")
        tokens = held.tokens
        if row < self._table.active:
            tokens = self._running[row].sequence
        elif self._joining is not None and self._joining.held is held:
            tokens = self._joining.request.work.prompt
        saved = tuple(caches.save_row(row, length) for caches in self._forward.caches)
        return held.salt, tokens[:length].copy(), saved

    def restore(self, name: int, salt: str, tokens: np.ndarray, saved: Sequence[SavedRow]) -> None:
        """:meth:`save` 的逆；原来在那里的前缀不要了。

        Raises:
            DsxError: ``DSX-E534``，正有请求在用，或前缀复用关着。
        """
        if not self._settings.prefix_reuse:
            raise slot_refused(name, "恢复了也用不上：前缀复用关着")
        row = self._idle_row(name)
        self._table.clear(row)  # 写到一半出了错，也不会有人以为里面还是原来的
        for caches, rows in zip(self._forward.caches, saved, strict=True):
            caches.ensure(len(tokens))
            caches.restore_row(row, rows)
        self._forward.admitted(row, len(tokens))
        self._table.place(row, salt, tokens)

    def erase(self, name: int) -> int:
        """忘掉一个槽里的前缀；返回它有几个 token。

        Raises:
            DsxError: ``DSX-E534``，正有请求在用。
        """
        row = self._idle_row(name)
        length = int(self._table.lengths[row])
        self._table.clear(row)
        return length

    def _idle_row(self, name: int) -> int:
        row, held = self._table.named(name)
        if held is not None and not held.finished:
            raise slot_refused(name, "正有请求在用")
        return row

    @property
    def outdated(self) -> bool:
        """模型断过、又起来了（或正在起）：这里的缓存与 ``failure`` 都是上一次的。"""
        return self._generation != self._session.runner.generation

    def lose(self, error: DsxError) -> None:
        """缓存用不了了：开始了的都以 ``error`` 失败，轮到的那一个也是；其余的接着排队，各行都不再留用。"""
        self._fail_started(error)
        if self.waiting:
            request = self.waiting.popleft()
            request.fail(error)
            self.counters.count(request.outcome)
        self._generation = -1

    def renew(self) -> None:
        """换一份缓存；开始了的请求，内容没有了，接不下去。"""
        self._fail_started(DsxError("DSX-E747", "模型断了又起来，算到一半的没有了", "重新提交"))
        self._open()
        self.failure = None

    def _fail_started(self, error: DsxError) -> None:
        started = [*self._running, *([] if self._joining is None else [self._joining.request])]
        self._running, self._joining = [], None
        for request in started:
            request.fail(error)
            self.counters.count(request.outcome)

    def abandon(self, end: Callable[[Request], None]) -> None:
        """对每个没有结束的请求调 ``end``，然后什么也不剩；此后不能再走。"""
        left = [*self.waiting, *self._running]
        if self._joining is not None:
            left.append(self._joining.request)
        self.waiting.clear()
        self._running, self._joining = [], None
        for request in left:
            end(request)
            self.counters.count(request.outcome)

    def _admit(self, request: Request) -> None:
        prompt = request.work.prompt
        if request.work.budget == 0:  # 提示词已经占满
            request.end("length")
            self.counters.count(request.outcome)
            return
        held = self._table.admit(prompt, request.work.salt)
        hit = int(self._table.lengths[held.row])
        self._forward.admitted(held.row, hit)
        request.start(hit)
        self.counters.prompt_tokens += len(prompt)
        self.counters.hit_tokens += hit
        self._joining = _Joining(request, held)

    def _prefill(self, joining: _Joining) -> None:
        """算一块；提示词算完了就给出第一个 token，加入生成。"""
        request, row, table = joining.request, joining.held.row, self._table
        prompt, begin = request.work.prompt, int(table.lengths[row])
        size = min(self._settings.prefill_tokens, len(prompt) - begin)
        try:
            last = begin + size == len(prompt)  # 只有最后一块选 token
            want_logits = last and request.work.sampler.needs_logits
            scores = self._forward.prefill(row, begin, prompt, size, want_logits)
        except DsxError as error:
            self.failure = error
            request.fail(error)
            self.counters.count(request.outcome)
            self._joining = None
            table.drop(joining.held)
            return
        self.failure = None
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += size
        table.lengths[row] += size
        if not last:
            return
        self._joining = None
        self._running.append(request)
        table.join(joining.held, prompt)
        start = len(self._running) - 1
        self._take(Step(scores, np.empty((1, 0), np.int64)), np.zeros(1, np.int64), start)
        self._pack()

    def _decode(self) -> None:
        """正在生成的各行各走一步。"""
        count, requests = len(self._running), self._running
        lengths, newest = self._table.lengths[:count], self._newest[:count]
        wanted = self._wanted(lengths)
        most, began = int(wanted.max()), perf_counter()
        try:
            choose = drafting(requests) if most else None
            want_logits = any(one.work.sampler.needs_logits for one in requests)
            step = self._forward.decode(newest, lengths, most, choose, want_logits)
            given = self._take(step, wanted, 0)
            if self._forward.drafter is not None and step.hidden is not None:
                self._forward.drafter.observe(lengths, step.hidden, given)
        except DsxError as error:
            self.failure = error
            for request in requests:
                request.fail(error)
            self._pack()
            return
        self.failure = None
        self.counters.decode_steps += 1
        lengths += given
        if self._forward.drafter is not None:
            self.counters.draft_calls = self._forward.drafter.calls
            if self._floor is not None:
                self._floor.add(count, most > 0, int(given.sum()), perf_counter() - began)
        self._pack()

    def _wanted(self, newest: np.ndarray) -> np.ndarray:
        """``[B]``，这一步各行要几个草稿：不超过还能给出的，止损线说不划算就都是 0。"""
        count = len(newest)
        most = 0
        if self._forward.drafter is not None and (self._floor is None or self._floor.wants(count)):
            most = self._forward.most_drafts(newest)
        if not most:
            return np.zeros(count, np.int64)
        return np.array([min(most, request.remaining - 1) for request in self._running], np.int64)

    def _take(self, step: Step, wanted: np.ndarray, start: int) -> np.ndarray:
        """给第 ``start`` 行起的各行选 token，交给它们的请求；返回各给出了几个 ``[n]``。"""
        peaks, best = step.scores.peaks.tolist(), step.scores.ids.tolist()
        every = step.scores.logits
        given = np.zeros(len(wanted), np.int64)
        for slot, drafts in enumerate(ragged(step, wanted)):
            request, row = self._running[start + slot], start + slot
            position = request.length
            logits = None if every is None else every[slot]
            tokens, error = accepted(request, logits, best[slot], peaks[slot], drafts, row)
            if tokens:
                given[slot], self._newest[row] = len(tokens), tokens[-1]
                if self._forward.drafter is not None:
                    self._forward.drafter.learn(row, position, tokens)
                self.counters.gave(tokens, drafts, request.ends_with(tokens[-1]))
                request.emit(tokens, _logprobs(request, logits, tokens))
            if error is not None:
                request.fail(error)
        return given

    def _retire(self, held: Held, request: Request) -> None:
        tokens = request.sequence
        usable = self._forward.usable(held.row, int(self._table.lengths[held.row]))
        self._table.retire(held, tokens[:usable])

    def _pack(self) -> None:
        """结束了的离开批次，它们的行留给以后的请求；失败了的不留。"""
        kept = np.array([not request.done for request in self._running], bool)
        if kept.all():
            return
        for row in np.flatnonzero(~kept).tolist():
            request, held = self._running[row], self._table.held(row)
            self.counters.count(request.outcome)
            if request.outcome == "error":
                self._table.drop(held)
            else:
                self._retire(held, request)
        packing = self._table.pack(kept)
        if packing is not None:
            self._running = packing.items(self._running)
            packing.array(self._newest[: len(kept)])


def _logprobs(request: Request, logits: np.ndarray | None, tokens: Sequence[int]) -> list[TokenLogprobs]:
    """要对数概率的请求，这一步每个 token 的；``logits`` ``[K+1, V]``。"""
    top = request.work.sampler.params.logprobs
    if top is None or logits is None:
        return []
    return [token_logprobs(logits[at], token, top) for at, token in enumerate(tokens)]
