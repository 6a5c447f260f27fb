"""一段对话：记着说过的话，每一问接着上文生成，现成的前缀不重算。``dsx chat`` 与 Python 都用它。"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter

from deepseek_export.errors import DsxError
from deepseek_export.runtime import BundleTokenizer, SamplingParams
from deepseek_export.runtime.stop import StopStrings
from deepseek_export.serving.engine import Engine
from deepseek_export.serving.http.reasoning import Parts, ReasoningSplit, begins_thinking
from deepseek_export.serving.request import Request


@dataclass(frozen=True)
class AnswerStats:
    """一个回答的用量。

    Attributes:
        prompt_tokens: 提示词（连同上文）的 token 数。
        cached_tokens: 其中缓存现成的，没有重算。
        new_tokens: 新 token 数。
        first_s: 提交到第一个 token 的秒数。
        decode_s: 第一个到最后一个 token 的秒数。
        reason: 为什么结束：``eos``、``stop``、``length``，中途停下的是 ``cancelled``。
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_s: float
    decode_s: float
    reason: str


class Conversation:
    """一段对话；一次只问一句，在一个线程里用。

    Args:
        engine: 服务引擎。
        tokenizer: 分词器，要有聊天模板。
        sampling: 采样参数，缺省为贪心。
        max_new_tokens: 一个回答至多几个新 token；``None`` 到上下文用完为止。
        stops: 停止串。
        ignore_eos: 遇到 eos 也不停。
        system: 系统提示词，没有就不给。

    Attributes:
        messages: 说过的话，``{"role", "content"}``，不含思考。
        stats: 从上一次 :meth:`reset` 起，每个回答的用量。

    Raises:
        DsxError: ``DSX-E514``，没有 tokenizer；``DSX-E502`` / ``DSX-E503``，没有聊天模板，或渲染不了；``DSX-E512``，停止串不对。
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: BundleTokenizer | None,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        stops: Sequence[str] = (),
        ignore_eos: bool = False,
        system: str | None = None,
    ) -> None:
        if tokenizer is None:
            raise DsxError(
                "DSX-E514", "bundle 没有 tokenizer，不能收发文本", "用带 tokenizer.json 的检查点导出"
            )
        StopStrings(stops)  # 不对的现在就说
        self._engine, self._tokenizer = engine, tokenizer
        self._sampling, self._stops, self._ignore_eos = sampling, tuple(stops), ignore_eos
        self._budget = max_new_tokens or engine.settings.context
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.stats: list[AnswerStats] = []
        self.reset()
        tokenizer.apply_chat_template([*self._opening, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """忘掉说过的话；系统提示词仍在，它的前缀也不重算。"""
        self.messages, self.stats = list(self._opening), []

    def ask(self, text: str) -> Generator[Parts]:
        """问一句，边生成边给出思考与答案的各段；不再取下一段（``close()``、异常）就停下，已经给出的算说过的话。

        Raises:
            DsxError: ``DSX-E511``，上文加这一问过长；模型跑不了的原因。这一问都不留在上文里。
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(asked)
        skip = 0 if self._sampling is None else self._sampling.min_tokens
        writer = _Writer(self._tokenizer, self._stops, begins_thinking(prompt), skip)
        request = self._engine.submit(
            self._tokenizer.encode(prompt),
            self._sampling,
            max_new_tokens=self._budget,
            ignore_eos=self._ignore_eos,
        )
        content, failed = "", False
        try:
            for token in request:
                parts = writer.feed(token)
                content += parts.content
                yield parts
                if writer.stopped:
                    break
            rest = writer.rest()
            content += rest.content
            yield rest
        except DsxError:
            failed = True
            raise
        finally:
            request.cancel()
            if writer.tokens and not failed:
                self.messages = [*asked, {"role": "assistant", "content": content}]
                self.stats.append(writer.stats(request))


class _Writer:
    """一个回答：token 变成思考与答案，找停止串。"""

    def __init__(
        self, tokenizer: BundleTokenizer, stops: Sequence[str], thinking: bool, skip: int = 0
    ) -> None:
        self._skip = skip  # 前这么多个 token 的文本里不找停止串
        self.tokens: list[int] = []
        self._tokenizer, self._stream = tokenizer, tokenizer.stream()
        self._stops, self._split = StopStrings(stops), ReasoningSplit(thinking)
        self._shown = ""
        self._began = self._first = self._latest = perf_counter()

    @property
    def stopped(self) -> bool:
        """遇到停止串了。"""
        return self._stops.stopped

    def feed(self, token: int) -> Parts:
        """送入下一个 token，返回因此能给出的。"""
        self._latest = perf_counter()
        if not self.tokens:
            self._first = self._latest
        self.tokens.append(token)
        piece = self._stream.step(token)
        self._shown += piece
        return self._split.feed(piece if len(self.tokens) <= self._skip else self._stops.feed(piece))

    def rest(self) -> Parts:
        """结束了：补上还攥着的半个字符，与可能是停止串、标记开头的那几个字。"""
        whole = self._tokenizer.decode(self.tokens)
        rest = whole[len(self._shown) :] if whole.startswith(self._shown) else ""
        parts = self._split.feed(self._stops.feed(rest) + self._stops.flush())
        last = self._split.flush()
        return Parts(parts.reasoning + last.reasoning, parts.content + last.content)

    def stats(self, request: Request) -> AnswerStats:
        """用量；``request`` 是这个回答的请求，还没有结束的算中途停下。"""
        return AnswerStats(
            prompt_tokens=len(request.work.prompt),
            cached_tokens=request.cached_tokens,
            new_tokens=len(self.tokens),
            first_s=self._first - self._began,
            decode_s=self._latest - self._first,
            reason="stop" if self.stopped else request.outcome or "cancelled",
        )
