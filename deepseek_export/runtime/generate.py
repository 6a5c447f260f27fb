"""自回归生成：分块 prefill，然后每步一个 token。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Generator as Iteration
from time import perf_counter
from typing import TypeAlias

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.errors import DsxError
from deepseek_export.runtime.batching import right_padded_chunks
from deepseek_export.runtime.packing import Packing
from deepseek_export.runtime.processors import row_processors
from deepseek_export.runtime.result import GenerationResult
from deepseek_export.runtime.rows import OutputRows
from deepseek_export.runtime.sampling import Sampler, SamplingParams, is_integer
from deepseek_export.runtime.scores import Scores
from deepseek_export.runtime.session import ModelSession
from deepseek_export.runtime.speculation.stats import SpeculationStats
from deepseek_export.runtime.stop import stopped_rows
from deepseek_export.runtime.tokenizer import BundleTokenizer

OnToken: TypeAlias = Callable[[int, int], None]
#: 一步一步的生成：每步给出新的 ``(行号, token)``，最后返回结果。
Steps: TypeAlias = Iteration[list[tuple[int, int]], None, GenerationResult]


class Generator:
    """在一个会话上生成文本，或算 teacher-forced 的 logits。

    Args:
        session: 加载好的模型。
        tokenizer: 只用来把结果解码成文本；``None`` 时结果没有文本。
        eos_token_ids: 任何一个都结束一行。
        prefill_chunk: prefill 每块的长度，限制注意力的峰值内存。

    Raises:
        DsxError: ``DSX-E512``，``prefill_chunk`` 不是正整数。
    """

    def __init__(
        self,
        session: ModelSession,
        tokenizer: BundleTokenizer | None,
        eos_token_ids: Iterable[int],
        prefill_chunk: int = 512,
    ) -> None:
        check_positive("prefill_chunk", prefill_chunk)
        self.session = session
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefill_chunk = prefill_chunk

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        on_token: OnToken | None = None,
        ignore_eos: bool = False,
        stop: Sequence[str] = (),
    ) -> GenerationResult:
        """批量生成。

        一行的总长（提示词加新 token）不超过 max_position_embeddings，到了就以 ``length`` 结束。

        Args:
            prompts: B 个 token id 序列，长度可以不同。
            max_new_tokens: 每行最多生成多少个。
            sampling: 采样参数，缺省为贪心。
            on_token: 每得到一个 token 调一次 ``on_token(row, token)``，同一步内按行号递增；投机解码一次先给完一行接受的几个，再轮到下一行。
            ignore_eos: 遇到 eos 也不停，基准测试用。
            stop: 停止串：一行的文本里出现任何一个就停，文本到它之前为止。

        Raises:
            DsxError: ``DSX-E514``，有停止串而没有 tokenizer；``DSX-E510``，没有提示词或提示词为空；``DSX-E511``，提示词过长；
                ``DSX-E512``，``max_new_tokens`` 不是正整数或小于 ``min_tokens``，或停止串不对；``DSX-E509``，token id 越界；
                ``DSX-E505``，logits 无法采样；``DSX-E518``，没有 token 可选；另见 :meth:`steps`。
        """
        steps = self.steps(prompts, max_new_tokens, sampling, ignore_eos=ignore_eos, stop=stop)
        while True:
            try:
                fresh = next(steps)
            except StopIteration as over:
                result: GenerationResult = over.value
                return result
            if on_token is not None:
                for row, token in fresh:
                    on_token(row, token)

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        *,
        ignore_eos: bool = False,
        stop: Sequence[str] = (),
    ) -> Steps:
        """同 :meth:`generate`，一步一步地走：每走一步给出新的 ``(行号, token)``，走完返回结果；不再取就停在那里。

        参数现在就核对，第一次取的时候才开始算。

        Raises:
            DsxError: 同 :meth:`generate`。
        """
        params = sampling or SamplingParams()
        rows, out = self._begin(prompts, max_new_tokens, params, ignore_eos, stop)
        ends = frozenset() if ignore_eos else self.eos_token_ids
        each = [row_processors(params, len(row), ends, self.session) for row in rows]
        return self._one_by_one(rows, max_new_tokens, Sampler(params, len(rows), each), out)

    def logits(self, ids: Sequence[Sequence[int]], chunk: int | None = None) -> list[np.ndarray]:
        """teacher-forced：每个位置的 logits，供对齐校验。

        Args:
            ids: B 个 token id 序列。
            chunk: 每次调用多少个位置；``None`` 一次走完，1 逐个 token。不超过后端一次给得出的行数。结果应当与切法无关。

        Returns:
            B 个 ``[len, V]`` float32。

        Raises:
            DsxError: 同 :meth:`generate`；``chunk`` 不是正整数时为 ``DSX-E512``。
        """
        if chunk is not None:
            check_positive("chunk", chunk)
        if self.session.limits.logits_rows is not None:
            chunk = min(chunk or self.session.limits.logits_rows, self.session.limits.logits_rows)
        rows = self._check_rows(ids)
        caches = self.session.new_caches(len(rows), max(len(row) for row in rows))
        out = [np.empty((len(row), self.session.vocab_size), np.float32) for row in rows]
        for part in right_padded_chunks(rows, chunk):
            every = np.broadcast_to(np.arange(part.input_ids.shape[1]), part.input_ids.shape)
            logits = self.session.run(part.input_ids, part.past_lens, every, caches)
            for row, count in enumerate(part.counts.tolist()):
                out[row][part.start : part.start + count] = logits[row, :count]
        return out

    def hidden(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """每个位置过了末尾归一化的 hidden。

        Args:
            ids: B 个 token id 序列。

        Returns:
            B 个 ``[len, D]`` float32。

        Raises:
            DsxError: ``DSX-E519``，图里没有它，说明怎么导出；其余同 :meth:`logits`。
        """
        rows = self._check_rows(ids)
        caches = self.session.new_caches(len(rows), max(len(row) for row in rows))
        found: list[list[np.ndarray]] = [[] for _ in rows]
        for part in right_padded_chunks(rows, self.prefill_chunk):
            hidden = self.session.hidden(part.input_ids, part.past_lens, caches)
            for row, count in enumerate(part.counts.tolist()):
                found[row].append(hidden[row, :count].copy())
        return [np.concatenate(parts) for parts in found]

    def _prefill(self, rows: list[np.ndarray], lens: np.ndarray, caches: Caches, want_logits: bool) -> Scores:
        """填好缓存，返回每行最后一个提示词 token 的分数，``[B, 1]`` 个位置。"""
        last: Scores | None = None
        for part in right_padded_chunks(rows, self.prefill_chunk):
            positions = np.maximum(part.counts - 1, 0)[:, None]
            got = self.session.scores(part.input_ids, part.past_lens, positions, caches, want_logits)
            last = got.each(np.copy) if last is None else last
            last.put((part.counts > 0) & (part.start + part.counts == lens), got)
        assert last is not None
        return last

    def _one_by_one(
        self, prompts: list[np.ndarray], max_new_tokens: int, sampler: Sampler, out: OutputRows
    ) -> Steps:
        """prefill，然后逐步生成，直到每行都结束；结束了的行当即离开批次。"""
        started = perf_counter()
        lens = lengths(prompts)
        caches = self.session.new_caches(len(prompts), int(lens.max()))
        want_logits = sampler.needs_logits
        scores = self._prefill(prompts, lens, caches, want_logits)
        prefilled = perf_counter()
        rows = np.arange(len(lens))  # 批次里的第几行是原来的第几行
        newest = lens.copy()  # 要选的 token 在整条序列里的下标，也是缓存里已有的长度

        def sequence(slot: int) -> list[int]:
            return [*prompts[rows[slot]].tolist(), *out.token_ids[rows[slot]]]

        if (packing := Packing.of(out.active)) is not None:  # 提示词恰好占满的行没有余地
            caches = packing.caches(caches, newest)
            rows, newest = packing.array(rows), packing.array(newest)
            scores = scores.each(packing.array)
        while rows.size:
            picked, logits = sampler.choose(scores, newest, rows, sequence), scores.logits
            for slot in np.argsort(rows).tolist():
                out.emit(int(rows[slot]), [int(picked[slot])], None if logits is None else logits[slot])
            yield out.take()
            if (packing := Packing.of(out.active[rows])) is not None:
                rows, picked = packing.array(rows), packing.array(picked)
                caches = packing.caches(caches, newest)
                newest = packing.array(newest)
            if rows.size:
                caches.ensure(int(newest.max()) + 1)
                first = np.zeros((len(rows), 1), np.int64)
                scores = self.session.scores(picked[:, None], newest, first, caches, want_logits)
                newest += 1
        notes = (*self.session.notes, *out.notes(max_new_tokens, self.session.max_positions))
        return self._result(lens, out, (started, prefilled, perf_counter()), notes)

    def _begin(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        params: SamplingParams,
        ignore_eos: bool,
        stop: Sequence[str],
    ) -> tuple[list[np.ndarray], OutputRows]:
        """核对过的提示词，与还空着的输出。"""
        check_budget(max_new_tokens, params.min_tokens)
        rows = self._check_rows(prompts)
        lens = lengths(rows)
        limit = self.session.max_positions  # 先在 Python 的整数里收进来：max_new_tokens 可以大得 64 位放不下
        budgets = np.minimum(min(max_new_tokens, limit), limit - lens)
        eos = frozenset() if ignore_eos else self.eos_token_ids
        stopped = stopped_rows(stop, self.tokenizer, len(rows), params.min_tokens)
        return rows, OutputRows(budgets, eos, stopped, params.logprobs)

    def _result(
        self,
        lens: np.ndarray,
        out: OutputRows,
        times: tuple[float, float, float],
        notes: tuple[str, ...],
        speculation: SpeculationStats | None = None,
    ) -> GenerationResult:
        """``times`` 是开始、prefill 完、解码完的时刻。"""
        started, prefilled, finished = times
        return GenerationResult(
            token_ids=out.token_ids,
            text=out.texts(self.tokenizer),
            prompt_lens=lens.tolist(),
            finish_reasons=out.reasons,
            prefill_s=prefilled - started,
            decode_s=finished - prefilled,
            speculation=speculation,
            notes=notes,
            logprobs=out.logprobs,
        )

    def _check_rows(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        if len(prompts) == 0:
            raise DsxError("DSX-E510", "提示词列表为空", "至少给一条提示词")
        return [
            checked_prompt(self.session, prompt, f"第 {row} 条提示词") for row, prompt in enumerate(prompts)
        ]


def lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    """各行的长度 ``[B]`` int64。"""
    return np.array([len(row) for row in rows], np.int64)


def checked_prompt(
    session: ModelSession, prompt: Sequence[int], where: str, context: int | None = None
) -> np.ndarray:
    """核对一条提示词，给出数组 ``[n]``。

    Args:
        session: 要运行它的模型。
        prompt: token id。
        where: 报错时怎么称呼它。
        context: 至多多长；``None`` 由模型决定。

    Raises:
        DsxError: ``DSX-E510``，没有 token；``DSX-E511``，过长；``DSX-E509``，token id 越界。
    """
    if len(prompt) == 0:
        raise DsxError("DSX-E510", f"{where}没有 token", "至少给一个 token，例如 bos")
    limit = session.max_positions if context is None else context
    if len(prompt) > limit:
        name = "max_position_embeddings" if context is None else "context"
        raise DsxError(
            "DSX-E511",
            f"{where}有 {len(prompt)} 个 token，{name} 是 {limit}",
            f"把它截到 {limit} 个 token 以内",
        )
    ids = np.asarray(prompt)
    session.check_ids(ids, where)
    return ids


def check_positive(name: str, value: int) -> None:
    """不是正整数就报 ``DSX-E512``。"""
    if not (is_integer(value) and value >= 1):
        raise DsxError("DSX-E512", f"{name}={value!r}", f"把 {name} 设为不小于 1 的整数")


def check_budget(max_new_tokens: int, min_tokens: int) -> None:
    """``max_new_tokens`` 不是正整数，或放不下 ``min_tokens``，就报 ``DSX-E512``。"""
    check_positive("max_new_tokens", max_new_tokens)
    if min_tokens > max_new_tokens:
        what = f"min_tokens={min_tokens}，而 max_new_tokens={max_new_tokens}"
        raise DsxError("DSX-E512", what, "让 min_tokens 不大于 max_new_tokens")
