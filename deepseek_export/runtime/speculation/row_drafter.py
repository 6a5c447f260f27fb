"""给一张行表起草：各行各有各的进度，随时有行加入、离开、搬家；服务引擎用。

记号同 :mod:`.drafter`：t_0..t_n 已知，h_0..h_{n-1} 已由主模型算出；模块 j 缓存的第 i 行由 (t_{i+j+1}, 前一级的 hidden 第 i 行) 算出。
主模型的 hidden 只留最近的几个。主模型自己走得太远之前先补算（:meth:`RowDrafter.catch_up`），所以草稿的缓存从不落下太多，什么时候都能接着起草。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.runtime.speculation.draft import Drafted, DraftSession

#: 不起草的时候，草稿的缓存至多落下这么多个 token：攒在一起补算，比逐个补算省。
_LAG = 32

#: ``(第几个草稿, logits [B, V]) -> 草稿 [B]``。
Choose = Callable[[int, np.ndarray], np.ndarray]


class RowDrafter:
    """一张行表的起草状态；行怎么搬由行表说了算，它搬 :attr:`caches` 与 :attr:`arrays`。

    Args:
        modules: 各模块，按顺序，至少一个。
        num_drafts: 每次至多几个草稿 K。
        rows: 行数 R。
        widest: 一次模块调用至多几个 token，不小于 ``num_drafts + len(modules)``。

    Attributes:
        caches: 各模块的缓存，R 行。
        arrays: 与行一起搬的数组，第 0 维都是 R。
        calls: 调了几次草稿模型。
    """

    def __init__(self, modules: Sequence[DraftSession], num_drafts: int, rows: int, widest: int) -> None:
        self.calls = 0
        self.caches: tuple[Caches, ...] = tuple(module.new_caches(rows) for module in modules)
        self._modules, self._most, self._last = list(modules), num_drafts, len(modules) - 1
        self._lag = max(min(_LAG, widest - self._last), num_drafts + 1)
        self._kept = self._lag + self._last
        port = modules[0].runner.contract.inputs["prev_hidden"]
        # 位置 i 的存在 i % 大小：只追加，不挪动。
        self._hidden = np.zeros((rows, self._kept, modules[0].hidden_size or 0), port.numpy)
        self._ids = np.zeros((rows, self._kept + num_drafts + len(modules)), np.int64)
        self._done = np.zeros(rows, np.int64)  # 上一次起草、补算时最新 token 的下标
        self.arrays = (self._hidden, self._ids, self._done)

    @property
    def redo(self) -> int:
        """接着用别人的前缀时，末尾要让主模型重算几个位置：再往前的草稿缓存与后面的 token 无关。"""
        return len(self._modules)

    def usable(self, row: int) -> int:
        """这一行的前多少个 token 可以给别人当前缀。"""
        return int(self._done[row]) + 1

    def restored(self, row: int, length: int) -> None:
        """这一行的缓存换成了现成的，可以给别人当前缀的有 ``length`` 个 token。"""
        self._done[row] = length - 1

    def prefill(self, row: int, start: int, prompt: np.ndarray, hidden: np.ndarray) -> None:
        """主模型走完提示词的一块之后，让各模块也走完。

        Args:
            row: 哪一行。
            start: 这一块从第几个位置起；这一行的前缀是现成的，就比它的长度小 :attr:`redo`。
            prompt: ``[n]``，整条提示词。
            hidden: ``[1, S, D]``，主模型在这一块上的 hidden。
        """
        size = hidden.shape[1]
        end = min(start + size, len(prompt) - 1)
        self._keep(row, start, hidden[0])
        # 末尾几行要的 token 还不知道，先填占位，第一次起草会重算它们。
        later = np.zeros(size + self._last + 1, np.int64)
        known = prompt[start + 1 : start + 1 + len(later)]
        later[: len(known)] = known
        self._run_through(row, start, later, hidden)
        recent = np.arange(max(0, end + 1 - self._kept), end + 1)
        self._ids[row, recent % self._ids.shape[1]] = prompt[recent]
        self._done[row] = end

    def learn(self, row: int, position: int, tokens: Sequence[int]) -> None:
        """知道了 ``position`` 起的几个 token。"""
        self._ids[row, (position + np.arange(len(tokens))) % self._ids.shape[1]] = tokens

    def observe(self, starts: np.ndarray, hidden: np.ndarray, counts: np.ndarray) -> None:
        """主模型走了一步。

        Args:
            starts: ``[B]``，前 B 行这一步从哪个位置起。
            hidden: ``[B, S, D]``，主模型的 hidden。
            counts: ``[B]``，每行前几个算数；那些 token 与下一个都已经 :meth:`learn` 过。

        Raises:
            DsxError: 补算时草稿模型执行失败。
        """
        rows, columns = np.nonzero(np.arange(hidden.shape[1]) < counts[:, None])
        self._hidden[rows, (starts[rows] + columns) % self._kept] = hidden[rows, columns]
        newest = starts + counts
        for row in np.flatnonzero(newest - self._done[: len(newest)] >= self._lag).tolist():
            self.catch_up(row, int(newest[row]))

    def catch_up(self, row: int, newest: int) -> None:
        """一行落下的都补算。

        Raises:
            DsxError: 草稿模型执行失败。
        """
        start = max(int(self._done[row]) - self._last, 0)
        index = np.arange(start, newest)
        if index.size:
            hidden = self._hidden[row, index % self._kept][None]
            later = self._ids[row, np.arange(start + 1, newest + self._last + 1) % self._ids.shape[1]]
            self._run_through(row, start, later, hidden)
        self._done[row] = newest

    def propose(self, newest: np.ndarray, num_drafts: int, choose: Choose | None = None) -> np.ndarray:
        """给前 B 行各起草几个。

        落下的多少不等：少的在右边填充，多写的几行以后都要重算。所以容量要放得下 ``max(newest) + K + 1`` 个位置。

        Args:
            newest: ``[B]``，最新 token 的下标 n；它还没有送进主模型。
            num_drafts: 各起草几个，不小于 1，不大于 K。
            choose: 怎么由 logits 选草稿；缺省取 argmax。

        Returns:
            ``[B, num_drafts]`` int64。

        Raises:
            DsxError: 草稿模型执行失败。
        """
        count = len(newest)
        for row in np.flatnonzero(newest - self._done[:count] > self._most + 1).tolist():
            self.catch_up(row, int(newest[row]))
        rows = np.arange(count)
        base = np.maximum(np.minimum(self._done[:count] - self._last, newest - 1), 0)
        counts = newest - base
        index = base[:, None] + np.arange(int(counts.max()))
        hidden = self._hidden[rows[:, None], index % self._kept]
        positions, drafts = (counts - 1)[:, None], np.zeros((count, num_drafts), np.int64)
        for step in range(self._last + 1):
            ids = self._ids[rows[:, None], (index + step + 1) % self._ids.shape[1]]
            drafted = self._run(step, ids, hidden, base, positions, choose is not None)
            hidden = drafted.hidden
            # 模块比草稿多的，也都要走：好让缓存跟上。
            chosen = _chosen(drafted, step, choose if step < num_drafts else None)
            drafts[:, step : step + 1] = chosen[:, None][:, : max(num_drafts - step, 0)]
            self._ids[rows, (newest + step + 1) % self._ids.shape[1]] = chosen
        hidden = hidden[rows, counts - 1][:, None]
        first = np.zeros_like(positions)
        for step in range(self._last + 1, num_drafts):
            past = newest + step - self._last - 1
            ids = drafts[:, step - 1 : step]
            drafted = self._run(self._last, ids, hidden, past, first, choose is not None)
            hidden, drafts[:, step] = drafted.hidden, _chosen(drafted, step, choose)
        self._done[:count] = newest
        return drafts

    def _keep(self, row: int, start: int, hidden: np.ndarray) -> None:
        recent = hidden[-self._kept :]
        index = start + len(hidden) - len(recent) + np.arange(len(recent))
        self._hidden[row, index % self._kept] = recent

    def _run_through(self, row: int, start: int, later: np.ndarray, hidden: np.ndarray) -> None:
        """让各模块走过一行的 ``start`` 起的几个位置；``later`` 是 ``start + 1`` 起的 token。"""
        size = hidden.shape[1]
        past, positions = np.array([start]), np.zeros((1, 1), np.int64)
        for index, (module, caches) in enumerate(zip(self._modules, self.caches, strict=True)):
            caches.ensure(start + size)
            ids = later[index : index + size][None]
            hidden = module.run(ids, hidden, past, positions, caches.rows(row, 1)).hidden
            self.calls += 1

    def _run(
        self,
        module: int,
        ids: np.ndarray,
        hidden: np.ndarray,
        past: np.ndarray,
        positions: np.ndarray,
        want_logits: bool,
    ) -> Drafted:
        caches = self.caches[module]
        caches.ensure(int(past.max()) + ids.shape[1])
        self.calls += 1
        view = caches.first(len(ids))
        return self._modules[module].run(ids, hidden, past, positions, view, want_logits)


def _chosen(drafted: Drafted, step: int, choose: Choose | None) -> np.ndarray:
    if choose is None or drafted.logits is None:
        return drafted.draft_id
    return choose(step, drafted.logits[:, -1])
