"""约束输出的语法（llguidance）：JSON Schema、正则、Lark；编译好的每个请求用一份。"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from deepseek_export.errors import DsxError
from deepseek_export.extras import require_grammar
from deepseek_export.formats.calls import Spell
from deepseek_export.formats.lark import ANY_TEXT, until
from deepseek_export.formats.limits import check_length
from deepseek_export.history import Follower

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: 编译好的留几个：同一个应用总用那几个。
_KEPT = 32
_QUOTED = re.compile(r"\s*(\d+ \||\^)")
_OPEN, _CLOSE = "<think>", "</think>"


def regex_grammar(regex: str) -> str:
    """整个输出合乎 ``regex``（Rust 的写法）；首尾的 ``^``、``$`` 可有可无。"""
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(regex.removeprefix('^').removesuffix('$'))}/"


class Grammars:
    """一个模型的各个语法；哪个线程都能用。

    Args:
        tokenizer: 分词器。
        vocab_size: logits 的宽度 V；多出来的 id 一律不许。
        eos_token_ids: 语法可以结束时才许的 token。

    Raises:
        DsxError: ``DSX-E761``，没有装 llguidance。
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        require_grammar()
        self._source, self._vocab_size = tokenizer, vocab_size
        self._eos = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._bridge: LLTokenizer | None = None
        self._ready: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, lark: str, thought: str | None = None, inner: str | None = None) -> Grammar:
        """编译一个语法，占住线程；大小、耗用都有上限，超出的拒绝。别人给的先过 :mod:`.limits`。

        Args:
            lark: llguidance 的 Lark。
            inner: 另一个语法，``lark`` 里叫它 ``@inner``。
            thought: 先有一段思考的，是 :func:`thought_rule` 给出的规则；语法从它之后才开始。

        Raises:
            DsxError: ``DSX-E760``，语法不对、太大，或没有文本合乎它；``DSX-E763``，模型没有 eos，停不下来。
        """
        if not self._eos:
            raise DsxError(
                "DSX-E763", "模型没有 eos，合乎语法的输出结束不了", "去掉语法，或换一个带 eos 的检查点"
            )
        whole = _assembled(lark, thought, inner)
        check_length(whole)
        with self._lock:
            matcher = self._ready.pop(whole, None) or self._compiled(whole)
            self._ready[whole] = matcher
            while len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
        return Grammar(matcher, self._vocab_size, self._eos)

    def _compiled(self, grammars: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._bridge is None:
            try:
                self._bridge = LLTokenizer(
                    self._source.to_str(), n_vocab=self._vocab_size, eos_token=self._eos
                )
            except Exception as error:  # llguidance 的 Rust 层只抛裸的异常
                raise _refused(f"这个 tokenizer 用不了语法：{error}") from error
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._bridge, grammars, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(_reason(matcher))
        if matcher.is_stopped() and not matcher.is_accepting():
            raise _refused("没有文本合乎这个语法")
        return matcher


class Grammar:
    """编译好的语法；:meth:`processor` 给出的各管一个请求。"""

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, tuple(eos)

    def processor(self, prompt_tokens: int) -> GrammarProcessor:
        """从长 ``prompt_tokens`` 的提示词之后开始。"""
        return GrammarProcessor(self._matcher, self._vocab_size, self._eos, prompt_tokens)


class GrammarProcessor:
    """采样的处理器：不合语法的 token 都屏蔽。只由 ``tokens`` 决定：退回去了就跟着退（验证草稿时会）。

    语法可以结束的地方才许 eos；只能结束的地方只许 eos。中途算不下去（超出每一步的限额，或许的都被别的处理器屏蔽了）就只许 eos，
    原因问 :meth:`failure`。

    Args:
        matcher: 语法，还没有走过；只用它的复制。
        vocab_size: 词表大小 V。
        eos: 结束的 token。
        prompt_tokens: 提示词有几个 token，语法从它之后开始。
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos: Sequence[int], prompt_tokens: int) -> None:
        self._pristine, self._matcher = matcher, matcher.deep_copy()
        self._vocab_size = vocab_size
        self._eos = np.array(eos)
        self._begin = prompt_tokens
        self._followed = Follower()
        self._taken = 0  # 语法走到生成的第几个 token
        #: 在哪条序列之后算不下去，为什么。
        self._dead: tuple[list[int], DsxError] | None = None

    def __call__(self, scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """见 :class:`~deepseek_export.runtime.sampling.Processor`。"""
        if self._dead is not None and self.failure(tokens[self._begin :]) is None:
            # 死路上的是丢掉了的草稿；出过错的 matcher 退不回来，换一个从头走。
            self._dead, self._matcher, self._taken = None, self._pristine.deep_copy(), 0
            self._followed = Follower()
        if self._dead is None:
            allowed = self._allowed(tokens)
            if self._dead is None and not (allowed & np.isfinite(scores)).any():
                self._dead = list(tokens[self._begin :]), _failed("语法许的 token 都被别的参数屏蔽了")
        if self._dead is not None:
            scores[:] = -np.inf
            scores[self._eos] = 0
            return scores
        scores[~allowed] = -np.inf
        return scores

    def failure(self, new_tokens: Sequence[int]) -> DsxError | None:
        """生成 ``new_tokens``（不含提示词）的途中为什么算不下去；没有就是 ``None``。"""
        if self._dead is None:
            return None
        path, error = self._dead
        return error if list(new_tokens[: len(path)]) == path else None

    def _allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """``[V]`` bool。"""
        _, new = self._followed.follow(tokens)
        common = max(len(tokens) - len(new) - self._begin, 0)
        if common < self._taken:
            self._matcher.rollback(self._taken - common)
            self._taken = common
        for token in tokens[self._begin + self._taken :]:
            # 结束了还要往下走（ignore_eos）：往后也只许 eos。
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
                break
            self._taken += 1
        allowed = np.zeros(self._vocab_size, bool)
        if self._matcher.is_stopped():
            allowed[self._eos] = True
        else:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed |= np.unpackbits(packed, count=self._vocab_size, bitorder="little").astype(bool)
            allowed[self._eos] = self._matcher.is_accepting()
        if self._matcher.is_error():
            self._dead = list(tokens[self._begin :]), _failed(_reason(self._matcher))
        return allowed


def thought_rule(spell: Spell, begun: bool) -> str:
    """规则 ``thought``：随便写，到 ``</think>`` 为止。

    Args:
        spell: 见 :func:`~deepseek_export.formats.lark.speller`。
        begun: 提示词已经替回答开了头；否则思考可有可无，有就从 ``<think>`` 开始。
    """
    if begun:
        return "thought: inside\n" + until("inside", ANY_TEXT, _CLOSE, spell)
    return f"thought: ({spell(_OPEN)} inside)?\n" + until("inside", ANY_TEXT, _CLOSE, spell)


def _assembled(lark: str, thought: str | None, inner: str | None) -> str:
    """llguidance 的 JSON：头一个是整个语法，别的由名字引用。"""
    grammars = [{"lark_grammar": lark}]
    if thought is not None:
        top = f"start: thought GAP? @answer\n{thought}\nGAP: /[ \\n]{{1,4}}/"
        grammars = [{"lark_grammar": top}, {"name": "answer", "lark_grammar": lark}]
    if inner is not None:
        grammars.append({"name": "inner", "lark_grammar": inner})
    return json.dumps({"grammars": grammars})


def _reason(matcher: LLMatcher) -> str:
    """错误里的话，不要抄回来的语法与指位置的尖号。"""
    lines = [line.strip() for line in matcher.get_error().splitlines() if not _QUOTED.match(line)]
    return " ".join(line for line in lines if line)[:500]


def _refused(what: str) -> DsxError:
    return DsxError("DSX-E760", what, "改语法：见 docs/serve.md 里支持的写法；schema 用得太复杂就拆开")


def _failed(what: Any) -> DsxError:
    return DsxError("DSX-E762", f"照着语法生成不下去：{what}", "简化语法，或去掉与它冲突的参数")
