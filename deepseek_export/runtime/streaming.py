"""一条提示词的文本，边生成边给。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from deepseek_export.runtime.generate import Steps
from deepseek_export.runtime.result import GenerationResult
from deepseek_export.runtime.stop import StoppedRow
from deepseek_export.runtime.tokenizer import BundleTokenizer


class TextStream(Iterator[str]):
    """逐段给出文本：半个字符、可能是停止串开头的几个字先攥着，各段接起来就是结果的文本。

    不想要了就不再取：还没有算的不算。也可以 :meth:`close`，或写成 ``with``。

    Args:
        steps: 一条提示词的生成。
        tokenizer: 解码用。
        stops: 停止串。
        skip: 前这么多个 token 的文本里不找停止串。

    Attributes:
        result: 取完之后的结果；没有取完是 ``None``。
    """

    def __init__(
        self, steps: Steps, tokenizer: BundleTokenizer, stops: Sequence[str] = (), skip: int = 0
    ) -> None:
        self.result: GenerationResult | None = None
        self._steps, self._row = steps, StoppedRow(tokenizer.stream(), stops, skip)

    def __next__(self) -> str:
        shown = len(self._row.text)
        while len(self._row.text) == shown:
            try:
                fresh = next(self._steps)
            except StopIteration as over:
                if over.value is None:  # 取完了，或关了
                    raise
                self.result = over.value
                if rest := self._rest(over.value):
                    return rest
                raise
            for _, token in fresh:
                self._row.feed(token)
        return self._row.text[shown:]

    def close(self) -> None:
        """不再要了，放掉缓存；可以调几次。"""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rest(self, result: GenerationResult) -> str:
        """还攥着的：半个字符，没有凑齐的停止串。"""
        whole = "" if result.text is None else result.text[0]
        return whole[len(self._row.text) :] if whole.startswith(self._row.text) else ""
