"""停止串：输出里出现它就停，给出的文本到它之前为止。"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deepseek_export.errors import DsxError
from deepseek_export.runtime.tokenizer import BundleTokenizer, TokenStream


class StopStrings:
    """一行输出里找停止串；文本一段一段地来，停止串可以跨着几段。

    可能是停止串开头的那几个字先攥着，确定不是才给出，所以流式输出里不会露出半个停止串。怎么切段不改变结果：先凑齐的那个算数，
    同时凑齐的取长的。

    Args:
        stops: 停止串，可以一个也没有。

    Attributes:
        stopped: 是不是已经停了；停了之后再来的文本都丢掉。
        found: 停在哪一个；还没停是 ``None``。

    Raises:
        DsxError: ``DSX-E512``，有的不是字符串，或是空串。
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise DsxError("DSX-E512", f"停止串里有 {stop!r}", "停止串是不空的字符串")
        self.stopped = False
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> str:
        """送入下一段，返回因此能给出的文本，可能为空串。"""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            self.stopped, self._held = True, ""
            return text[:at]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """输出结束了：攥着的也给出来。"""
        text, self._held = self._held, ""
        return text


def stop_list(stop: str | Sequence[str] | None) -> list[str]:
    """一个、几个或没有停止串，都写成列表。

    Raises:
        DsxError: ``DSX-E512``，别的写法。
    """
    if stop is None or isinstance(stop, str):
        return [] if stop is None else [stop]
    if not isinstance(stop, Iterable):
        raise DsxError("DSX-E512", f"stop={stop!r}", '给一个停止串 "。"，或几个 ["。", "\\n"]')
    return list(stop)


def _overlap(text: str, stop: str) -> int:
    """``text`` 的末尾有多少个字是 ``stop`` 的开头，不算整个 ``stop``。"""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class StoppedRow:
    """一行输出，边解码边找停止串。

    Args:
        stream: 这一行的流式解码器。
        stops: 停止串。
        skip: 前这么多个 token 的文本里不找。

    Attributes:
        text: 停止串之前的文本；还没停的时候不含攥着的。
    """

    def __init__(self, stream: TokenStream, stops: Sequence[str], skip: int = 0) -> None:
        self._stream, self._stops, self._skip = stream, StopStrings(stops), skip
        self.text = ""

    @property
    def stopped(self) -> bool:
        """停了没有。"""
        return self._stops.stopped

    def feed(self, token: int) -> bool:
        """送入下一个 token，返回停了没有。"""
        piece = self._stream.step(token)
        self.text += piece if self._skip > 0 else self._stops.feed(piece)
        self._skip -= 1
        return self.stopped


def stopped_rows(
    stops: Sequence[str], tokenizer: BundleTokenizer | None, batch: int, skip: int = 0
) -> list[StoppedRow] | None:
    """每行一个，前 ``skip`` 个 token 的文本里不找；没有停止串为 ``None``。

    Raises:
        DsxError: ``DSX-E514``，有停止串而没有 tokenizer；``DSX-E512``，停止串不对。
    """
    if not stops:
        return None
    if tokenizer is None:
        raise DsxError("DSX-E514", f"停止串 {stops[0]!r} 要在文本里找，而这里没有 tokenizer", "去掉停止串")
    return [StoppedRow(tokenizer.stream(), stops, skip) for _ in range(batch)]
