"""一批输出：逐行收 token，在 eos 或长度上限处截断。"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from deepseek_export.runtime.logprobs import TokenLogprobs, token_logprobs
from deepseek_export.runtime.result import FinishReason
from deepseek_export.runtime.stop import StoppedRow
from deepseek_export.runtime.tokenizer import BundleTokenizer


class OutputRows:
    """普通解码与投机解码共用的截断规则，所以两者的输出在同样的 token 处结束。

    Args:
        budgets: ``[B]``，每行至多多少个 token，可以为 0。
        eos: 任何一个都结束一行；它自己算在输出里。
        stopped: 每行一个，找停止串；没有停止串为 ``None``。凑齐停止串的那个 token 算在输出里，文本里没有停止串。
        logprobs: 每个 token 另记最可能的几个的对数概率；``None`` 不记。

    Attributes:
        token_ids: 每行收到的 token。
        reasons: 每行为什么结束。
        active: ``[B]`` bool，还没有结束的行。
        remaining: ``[B]`` int64，每行还能收几个。
        logprobs: 每行每个 token 的对数概率；不记为 ``None``。
    """

    def __init__(
        self,
        budgets: np.ndarray,
        eos: frozenset[int],
        stopped: Sequence[StoppedRow] | None = None,
        logprobs: int | None = None,
    ) -> None:
        self._eos = eos
        self._stopped = stopped
        self._budgets = budgets
        self._fresh: list[tuple[int, int]] = []
        self.token_ids: list[list[int]] = [[] for _ in budgets]
        self.reasons: list[FinishReason] = ["length"] * len(budgets)
        self.active = budgets > 0
        self.remaining = budgets.astype(np.int64)
        self._top = logprobs
        self.logprobs: list[list[TokenLogprobs]] | None = None if logprobs is None else [[] for _ in budgets]

    def emit(self, row: int, tokens: Iterable[int], logits: np.ndarray | None = None) -> int:
        """给还没结束的一行依次添上 ``tokens``，到它结束为止；返回收下了几个。

        Args:
            row: 第几行。
            tokens: 至多 n 个。
            logits: ``[n, V]``，它们各从哪一行 logits 里选出来；只在要对数概率时用到，不要就可以没有。
        """
        taken = 0
        for token in tokens:
            self.token_ids[row].append(token)
            if self.logprobs is not None and self._top is not None and logits is not None:
                self.logprobs[row].append(token_logprobs(logits[taken], token, self._top))
            taken += 1
            self.remaining[row] -= 1
            self._fresh.append((row, token))
            ended = self._ended(row, token)
            if ended is not None:
                self.reasons[row] = ended
            self.active[row] = ended is None and self.remaining[row] > 0
            if not self.active[row]:
                break
        return taken

    def take(self) -> list[tuple[int, int]]:
        """上一次取走之后收下的 ``(行号, token)``，依次。"""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _ended(self, row: int, token: int) -> FinishReason | None:
        if token in self._eos:
            return "eos"
        return "stop" if self._stopped is not None and self._stopped[row].feed(token) else None

    def texts(self, tokenizer: BundleTokenizer | None) -> list[str] | None:
        """每行的文本，遇到停止串的到它之前；没有 tokenizer 为 ``None``。"""
        if tokenizer is None:
            return None
        texts = [tokenizer.decode(ids) for ids in self.token_ids]
        if self._stopped is None:
            return texts
        rows = zip(self._stopped, texts, strict=True)
        return [row.text if row.stopped else text for row, text in rows]

    def notes(self, max_new_tokens: int, limit: int) -> tuple[str, ...]:
        """因为模型放不下而少给了的，说一声。

        Args:
            max_new_tokens: 要的是每行至多多少个。
            limit: 模型的最大长度。
        """
        cut = [
            row
            for row, reason in enumerate(self.reasons)
            if reason == "length" and self._budgets[row] < max_new_tokens
        ]
        if not cut:
            return ()
        which = f"第 {'、'.join(map(str, cut))} 行" if len(self.reasons) > 1 else "提示词"
        most = "、".join(str(self._budgets[row]) for row in cut)
        return (
            f"要 {max_new_tokens} 个新 token，{which}之后只放得下 {most} 个：max_position_embeddings 是 {limit}",
        )
