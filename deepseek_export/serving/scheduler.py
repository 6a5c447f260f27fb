"""一步一步地跑：谁开始、谁算提示词、谁生成。没有线程，也不等待；线程与排队的上限在 :mod:`.engine`。

一步至多两次模型调用：给正在加入的那个请求算一块提示词（至多 ``prefill_tokens`` 个 token，只有它那一行），再给正在生成的各行各走
一个 token。所以不管来了多长的提示词，别人的两个 token 之间至多插进一块。一块怎么切只看这个请求自己，两次调用都没有填充。
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.runtime import ModelSession
from deepseek_export.runtime.sampling import pick_tokens, unusable_logits
from deepseek_export.serving.request import Request
from deepseek_export.serving.rows import Held, RowTable
from deepseek_export.serving.settings import FittedSettings
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

    Attributes:
        waiting: 排队的请求，先来先走。
        counters: 累计。
        failure: 最近一次模型调用为什么失败；成功一次就是 ``None``。

    Raises:
        DsxError: ``DSX-E919``，TensorRT 引擎的一行没有对齐，不能只运行其中一行。
    """

    def __init__(self, session: ModelSession, settings: FittedSettings) -> None:
        self.waiting: deque[Request] = deque()
        self.counters = Counters()
        self.failure: DsxError | None = None
        self._session, self._settings = session, settings
        self._open()
        self._joining: _Joining | None = None
        self._running: list[Request] = []  # 第 b 个占着第 b 行
        self._newest = np.zeros(settings.rows, np.int64)  # 每行最新的 token，还没有送进模型
        self._first = np.zeros((settings.rows, 1), np.int64)  # 解码的一步只有一个位置

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
        return self._table.caches.nbytes

    def step(self) -> None:
        """走一步。

        模型调用失败（``DsxError``）只算在这次调用里的请求头上，它们的行也不再留用。

        Raises:
            DsxError: 缓存搬不动，或模型断了还没有起来：接着要 :meth:`lose`。
        """
        if self.outdated:
            self._renew()
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
            self._table.retire(joining.held, joining.request.work.prompt)
            self._joining = None
        for request in self._running:
            if request.cancelled:
                request.end("cancelled")
        self._pack()

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

    def _open(self) -> None:
        """分配缓存，各行都空着。"""
        self._generation = self._session.runner.generation
        caches = self._session.new_caches(self._settings.rows)
        if self._settings.rows > 1:
            caches.rows(1, 1)  # 后端做不到只运行其中一行的，现在就说
        self._table = RowTable(caches, self._settings.prefix_reuse)

    def _renew(self) -> None:
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
        request.start(hit)
        self.counters.prompt_tokens += len(prompt)
        self.counters.hit_tokens += hit
        self._joining = _Joining(request, held)

    def _prefill(self, joining: _Joining) -> None:
        """算一块；提示词算完了就给出第一个 token，加入生成。"""
        request, row, table = joining.request, joining.held.row, self._table
        prompt, begin = request.work.prompt, int(table.lengths[row])
        part = prompt[begin : begin + self._settings.prefill_tokens]
        last = np.array([[len(part) - 1]])
        try:
            table.caches.ensure(begin + len(part))
            view = table.caches.rows(row, 1)
            logits = self._session.run(part[None], table.lengths[row : row + 1], last, view)[:, 0]
        except DsxError as error:
            self.failure = error
            request.fail(error)
            self.counters.count(request.outcome)
            self._joining = None
            table.drop(joining.held)
            return
        self.failure = None
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += len(part)
        table.lengths[row] += len(part)
        if begin + len(part) < len(prompt):
            return
        self._joining = None
        self._running.append(request)
        table.join(joining.held, prompt)
        self._take(logits, len(self._running) - 1)

    def _decode(self) -> None:
        """正在生成的各行各走一个 token。"""
        table, count = self._table, len(self._running)
        lengths = table.lengths[:count]
        try:
            table.caches.ensure(int(lengths.max()) + 1)
            view = table.caches.first(count)
            logits = self._session.run(self._newest[:count, None], lengths, self._first[:count], view)[:, 0]
        except DsxError as error:
            self.failure = error
            for request in self._running:
                request.fail(error)
            self._pack()
            return
        self.failure = None
        self.counters.decode_steps += 1
        lengths += 1
        self._take(logits, 0)

    def _take(self, logits: np.ndarray, start: int) -> None:
        """给第 ``start`` 行起的各行选 token；``logits`` ``[n, V]``。结束了的离开。"""
        requests, lengths = self._running[start:], self._table.lengths[start : start + len(logits)]
        peaks = logits.max(axis=1)
        usable = np.isfinite(peaks)
        if not usable.all():
            for slot in np.flatnonzero(~usable).tolist():
                requests[slot].fail(unusable_logits(start + slot, float(peaks[slot])))
            logits, lengths = logits[usable], lengths[usable]
        rows = np.flatnonzero(usable).tolist()
        picked = pick_tokens(logits, lengths, [requests[slot].work.sampler for slot in rows])
        self._newest[start : start + len(requests)][usable] = picked
        for slot, token in zip(rows, picked.tolist(), strict=True):
            self.counters.generated_tokens += 1
            requests[slot].emit(token)
        self._pack()

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
                tokens = np.concatenate([request.work.prompt, np.array(request.token_ids, np.int64)])
                self._table.retire(held, tokens)
        packing = self._table.pack(kept)
        if packing is not None:
            self._running = packing.items(self._running)
            packing.array(self._newest[: len(kept)])
