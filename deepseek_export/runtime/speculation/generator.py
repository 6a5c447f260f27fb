"""投机解码：MTP 模块起草若干 token，主模型一次调用验证，输出与逐个 token 解码相同。"""

from __future__ import annotations

from collections.abc import Generator as Iteration
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from deepseek_export.backend.base import Caches
from deepseek_export.backend.contract import contract_broken
from deepseek_export.errors import DsxError
from deepseek_export.runtime.batching import right_padded_chunks
from deepseek_export.runtime.generate import Generator, Steps, lengths
from deepseek_export.runtime.packing import Packing
from deepseek_export.runtime.rows import OutputRows
from deepseek_export.runtime.sampling import SamplingParams, check_peaks, is_integer
from deepseek_export.runtime.session import ModelSession, Verified, VerifyMode
from deepseek_export.runtime.speculation.chance import RowChance
from deepseek_export.runtime.speculation.draft import DraftSession
from deepseek_export.runtime.speculation.drafter import Drafter
from deepseek_export.runtime.speculation.floor import Floor, FloorWatch, Round, refused
from deepseek_export.runtime.speculation.stats import Tally
from deepseek_export.runtime.tokenizer import BundleTokenizer

MAX_DRAFT_TOKENS = 8


@dataclass
class _Run:
    """一次生成的全部状态；解码时只有还没结束的行。

    Attributes:
        rows: ``[B]``，批次里的第几行是原来的第几行。
        tokens: ``[B, W]``，提示词与生成的 token；``newest`` 之后的内容没有意义。
        newest: ``[B]``，每行最新 token 的下标，它还没有送进主模型。
        drafter: 不再投机时为 ``None``。
    """

    rows: np.ndarray
    tokens: np.ndarray
    newest: np.ndarray
    caches: Caches
    out: OutputRows
    drafter: Drafter | None
    chance: RowChance | None
    tally: Tally

    @property
    def wants_logits(self) -> bool:
        """验证在图里，主机只在要对数概率时才看 logits。"""
        return self.out.logprobs is not None

    def pack(self) -> None:
        """结束了的行离开批次。"""
        packing = Packing.of(self.out.active[self.rows])
        if packing is None:
            return
        self.caches = packing.caches(self.caches, self.newest)
        self.rows, self.tokens = packing.array(self.rows), packing.array(self.tokens)
        if self.drafter is not None:
            self.drafter.pack(packing, self.tokens, self.newest)
        if self.chance is not None:
            self.chance.pack(packing)
        self.newest = packing.array(self.newest)


class SpeculativeGenerator(Generator):
    """带草稿的生成器；``logits`` 与 :class:`Generator` 相同。

    Args:
        session: 带草稿验证的主模型。
        drafts: 各 MTP 模块，按顺序，至少一个。
        tokenizer: 只用来把结果解码成文本。
        eos_token_ids: 任何一个都结束一行。
        num_draft_tokens: 每次调用至多验证几个草稿，1 到 8；多于模块数时最后一个模块递归。
        verify_mode: 必须与主模型图里的一致。
        prefill_chunk: prefill 每块的长度。
        floor: 止损线；``None`` 表示一直投机。

    Raises:
        DsxError: ``DSX-E516``，``num_draft_tokens`` 或 ``drafts`` 不在允许范围内；``DSX-E508``，
            主模型与草稿模型或验证方式对不上；``DSX-E512``，``prefill_chunk`` 不是正整数。
    """

    def __init__(
        self,
        session: ModelSession,
        drafts: Sequence[DraftSession],
        tokenizer: BundleTokenizer | None,
        eos_token_ids: Iterable[int],
        num_draft_tokens: int,
        verify_mode: VerifyMode,
        prefill_chunk: int = 512,
        floor: Floor | None = None,
    ) -> None:
        super().__init__(session, tokenizer, eos_token_ids, prefill_chunk)
        if not (is_integer(num_draft_tokens) and 1 <= num_draft_tokens <= MAX_DRAFT_TOKENS):
            raise refused("num_draft_tokens", num_draft_tokens, f" 1 到 {MAX_DRAFT_TOKENS} 的整数")
        if not drafts:
            raise refused("drafts", list(drafts), "至少一个草稿模块")
        if session.verify_mode != verify_mode:
            raise contract_broken(f"约定的验证方式是 {verify_mode}，主模型图里的是 {session.verify_mode}")
        sizes = [(s.vocab_size, s.hidden_size) for s in (session, *drafts)]
        if len(set(sizes)) > 1:
            raise contract_broken(f"主模型与草稿模型的 (词表, hidden) 大小不一致：{sizes}")
        self.drafts = list(drafts)
        self.num_draft_tokens = num_draft_tokens
        self.verify_mode = verify_mode
        self.floor = floor

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams | None = None,
        *,
        ignore_eos: bool = False,
        stop: Sequence[str] = (),
    ) -> Steps:
        """投机地走；参数与结果的含义同 :meth:`Generator.steps`，一步一轮，结果另带 ``speculation`` 统计。

        ``greedy`` 的输出与普通贪心解码逐个 token 相同；``rejection`` 的输出与普通采样同分布（但同一个种子
        给出的序列不同），一行给了种子的结果与同批还有谁无关。

        Raises:
            DsxError: ``DSX-E515``，采样参数与验证方式不相容；``DSX-E516``，给了种子，止损线却要看时间；其余同
                :meth:`Generator.generate`。
        """
        params = sampling or SamplingParams()
        self._check_sampling(params)
        rows, out = self._begin(prompts, max_new_tokens, params, ignore_eos, stop)
        return self._speculated(rows, max_new_tokens, params, out)

    def _speculated(
        self, rows: list[np.ndarray], max_new_tokens: int, params: SamplingParams, out: OutputRows
    ) -> Steps:
        started = perf_counter()
        lens = lengths(rows)
        run = self._start(rows, lens, out, params)
        first, logits = self._prefill_ids(rows, run)
        prefilled = perf_counter()
        for row in np.flatnonzero(out.active).tolist():
            run.tokens[row, lens[row]] = first[row]
            out.emit(row, [int(first[row])], logits[row : row + 1])
        yield out.take()
        notes, draft_calls = yield from self._decode_rounds(run)
        stats = run.tally.stats(draft_calls, fell_back=bool(notes))
        times = (started, prefilled, perf_counter())
        notes += tuple(dict.fromkeys(note for s in (self.session, *self.drafts) for note in s.notes))
        notes += out.notes(max_new_tokens, self.session.max_positions)
        return self._result(lens, out, times, notes, stats)

    def _start(
        self, rows: list[np.ndarray], lens: np.ndarray, out: OutputRows, params: SamplingParams
    ) -> _Run:
        batch, most = len(rows), self.num_draft_tokens
        tokens = np.zeros((batch, int((lens + out.remaining).max()) + 2 * most + 1), np.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        chance = None
        if self.verify_mode == "rejection":
            chance = RowChance(params, batch, most, self.session.vocab_size)
        # 只要一个 token 时没有可投机的，草稿的缓存也不必建。
        plain = 0 if self.floor is None else self.floor.max_plain_rounds
        drafter = Drafter(self.drafts, most, tokens, lens, chance, plain) if out.remaining.max() > 1 else None
        return _Run(
            rows=np.arange(batch),
            tokens=tokens,
            newest=lens.copy(),
            caches=self.session.new_caches(batch, int(lens.max())),
            out=out,
            drafter=drafter,
            chance=chance,
            tally=Tally(most, self.verify_mode),
        )

    def _prefill_ids(self, rows: list[np.ndarray], run: _Run) -> tuple[np.ndarray, np.ndarray]:
        """填好主模型与草稿模型的缓存，返回每行的第一个新 token ``[B]`` 与它的 logits ``[B, V]``；不要对数概率时后者是空的。"""
        first = np.zeros(len(rows), np.int64)
        kept = np.empty((len(rows), self.session.vocab_size if run.wants_logits else 0), np.float32)
        none, no_drafts = np.empty((len(rows), 0), np.int64), np.zeros(len(rows), np.int64)
        for part in right_padded_chunks(rows, self.prefill_chunk):
            ends_here = (part.counts > 0) & (part.start + part.counts == run.newest)
            chance = None if run.chance is None else run.chance.draw(run.newest, no_drafts, 0, ends_here)
            positions = np.maximum(part.counts - 1, 0)[:, None]
            got = self.session.verify(
                part.input_ids, part.past_lens, positions, none, run.caches, chance, run.wants_logits
            )
            _check_used(got, ends_here & run.out.active, run.rows)
            first[ends_here] = got.next_id[ends_here]
            if got.scores.logits is not None and run.wants_logits:
                kept[ends_here] = got.scores.logits[ends_here, 0]
            if run.drafter is not None:
                run.drafter.prefill(part, got.hidden)
        return first, kept

    def _decode_rounds(
        self, run: _Run
    ) -> Iteration[list[tuple[int, int]], None, tuple[tuple[str, ...], int]]:
        """起草、验证、收下，直到每行都结束，一轮一步；返回说明与草稿模型的调用次数。"""
        out = run.out
        watch = FloorWatch(self.floor, self.num_draft_tokens, len(run.rows))
        draft_calls = 0
        run.pack()
        while run.rows.size:
            began = perf_counter()
            counts = self._draft_counts(run, watch.drafting[run.rows])
            drafts = self._propose(run, counts)
            got = self._verify(run, drafts, counts)
            rounds: dict[int, Round] = {}
            for slot in np.argsort(run.rows).tolist():
                row, count, proposed = int(run.rows[slot]), int(got.num_accepted[slot]), int(counts[slot])
                new = [*drafts[slot, :count].tolist(), int(got.next_id[slot])]
                logits = got.scores.logits
                taken = out.emit(row, new, None if logits is None else logits[slot])
                begin = run.newest[slot] + 1
                run.tokens[slot, begin : begin + len(new)] = new
                run.newest[slot] += len(new)
                # 被截断的行只算到截断处，后面的草稿对不对已经无所谓。
                run.tally.add(
                    min(proposed, taken) if taken < len(new) else proposed, min(count, taken), taken
                )
                rounds[row] = Round(proposed, 1, min(count, taken), taken, 0.0)
            run.tally.main_calls += 1
            if run.drafter is not None:
                draft_calls = run.drafter.calls
                run.drafter.observe(got.hidden, got.num_accepted + 1)
                watch.add(rounds, perf_counter() - began, out.active)
                if not watch.speculating[out.active].any():
                    run.drafter = None
            yield out.take()
            run.pack()
        return watch.notes, draft_calls

    def _draft_counts(self, run: _Run, drafting: np.ndarray) -> np.ndarray:
        """``[B]``，这一轮各行起草几个，可以为 0；只看这一行自己：它剩余的长度，止损线停没停它。

        剩余的长度已经把 max_positions 算在内，一行自己的草稿因此不会越过它。
        """
        if run.drafter is None:
            return np.zeros(len(drafting), np.int64)
        return np.where(drafting, np.clip(run.out.remaining[run.rows] - 1, 0, self.num_draft_tokens), 0)

    def _propose(self, run: _Run, counts: np.ndarray) -> np.ndarray:
        """这一轮的草稿 ``[B, K]``；K 是各行里最多的，可以为 0。"""
        if run.drafter is None or not counts.any():
            return np.empty((len(counts), 0), np.int64)
        return run.drafter.propose(run.newest, counts)

    def _verify(self, run: _Run, drafts: np.ndarray, counts: np.ndarray) -> Verified:
        """主模型走一步 ``[t_n, d_1 .. d_K]``；一行自己的草稿不到 K 个时，多的只是占位，结果里没有它们。

        离最大长度不到 K 的行放不下占位，往前挪，连着把最后几个已知的 token 重走一遍：写回缓存的还是同样的行。
        """
        batch, width = len(counts), drafts.shape[1] + 1
        past = np.minimum(run.newest, self.session.max_positions - width)
        shift = (run.newest - past)[:, None]
        run.caches.ensure(int(past.max()) + width)
        line = np.concatenate([run.tokens[np.arange(batch), run.newest][:, None], drafts], axis=1)
        columns = np.arange(width) - shift
        known = np.take_along_axis(run.tokens, np.maximum(run.newest[:, None] + columns, 0), axis=1)
        input_ids = np.where(columns < 0, known, np.take_along_axis(line, np.maximum(columns, 0), axis=1))
        positions = np.minimum(np.arange(width) + shift, width - 1)
        every = np.ones(batch, bool)
        chance = None
        if run.chance is not None:
            chance = run.chance.draw(run.newest + 1, counts, width - 1, every)
        got = self.session.verify(input_ids, past, positions, drafts, run.caches, chance, run.wants_logits)
        # greedy 会连占位一起接受：头一个占位既然对了，它就是下一个 token。rejection 的占位必被拒绝。
        padded = np.concatenate([drafts, got.next_id[:, None]], axis=1)
        beyond = np.take_along_axis(padded, counts[:, None], axis=1)[:, 0]
        got = replace(
            got,
            num_accepted=np.minimum(got.num_accepted, counts),
            next_id=np.where(got.num_accepted > counts, beyond, got.next_id),
            hidden=np.take_along_axis(got.hidden, positions[:, :, None], axis=1)
            if shift.any()
            else got.hidden,
        )
        _check_used(got, every, run.rows)
        return got

    def _check_sampling(self, params: SamplingParams) -> None:
        if params.changes_logits:
            raise DsxError(
                "DSX-E515",
                f"{'、'.join(params.changes_logits)} 要先改 logits，而草稿在图里验证，改不到",
                "去掉它们，或加 --no-speculative（Python 里 speculative=False）逐个 token 解码",
            )
        if self.verify_mode == "greedy":
            if not params.greedy:
                raise DsxError(
                    "DSX-E515",
                    f"temperature={params.temperature:g}，而这个 bundle 只会验证贪心的草稿（mtp.verify=greedy）",
                    "用 --set mtp.verify=rejection 重新导出，或加 --no-speculative 用普通采样",
                )
        elif params.greedy:
            raise DsxError(
                "DSX-E515",
                "temperature=0，而这个 bundle 按采样验证草稿（mtp.verify=rejection），要除以温度",
                "贪心请用 mtp.verify=greedy 导出的 bundle，或加 --no-speculative；采样请给大于 0 的温度",
            )
        elif params.top_k or params.top_p < 1 or params.min_p:
            raise DsxError(
                "DSX-E515",
                f"top_k={params.top_k}、top_p={params.top_p:g}、min_p={params.min_p:g}：草稿验证不截断分布，"
                "输出会与普通采样不同分布",
                "去掉 top-k、top-p 与 min-p，或加 --no-speculative",
            )
        elif params.seed is not None and self.floor is not None and not self.floor.per_row:
            raise refused(
                "floor",
                self.floor,
                "逐行看的止损线（SpeculativeFloor）或 None：看时间的停在哪一轮，凭种子重现不了",
            )


def _check_used(got: Verified, wanted: np.ndarray, rows: np.ndarray) -> None:
    """与普通解码一样，用到的 logits 里没有有限的最大值就报错（``DSX-E505``）；只求最大值，不复制。"""
    peaks = got.scores.peaks
    used = wanted[:, None] & (np.arange(peaks.shape[1]) <= got.num_accepted[:, None])
    slots = np.nonzero(used)[0]
    check_peaks(peaks[used], rows[slots])
