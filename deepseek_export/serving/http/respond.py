"""把一轮生成答给客户端：整个的，或流式的（SSE）；客户端走了就停。"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deepseek_export.errors import DsxError
from deepseek_export.serving.http.answers import Answering
from deepseek_export.serving.http.guards import Receive, Scope, Send, note
from deepseek_export.serving.http.metrics import Metrics
from deepseek_export.serving.http.problems import ApiError, json_response
from deepseek_export.serving.http.said import Said
from deepseek_export.serving.http.turn import ClientGoneError, Piece, Turn

#: 流式的回答这么多秒没有东西可发，就发一行注释，免得中间的代理以为连接断了。
KEEP_ALIVE_S = 15.0
#: nginx 给“客户端先走了”的状态码；没有人收得到，只在日志里。
_CLIENT_GONE = 499

logger = logging.getLogger("dsx.serve")


class Reply:
    """一轮生成与它的回答。

    Args:
        turn: 已经交给引擎的。
        answer: 回答的样子。
        request: HTTP 请求，看客户端走了没有。
        metrics: 指标。
    """

    def __init__(self, turn: Turn, answer: Answering, request: Request, metrics: Metrics) -> None:
        self.turn, self.answer = turn, answer
        self._request, self._metrics = request, metrics.of(answer.model)
        self._first_s: float | None = None
        self._failed = False

    async def whole(self) -> Response:
        """等全部做完，一次答完。

        Raises:
            DsxError: 有一个请求失败了。
            ApiError: 503，服务要停。
        """
        said = [Said.of(choice) for choice in self.turn.choices]
        # Starlette 只替流式的回答看着客户端，不替这一种。
        watch = asyncio.create_task(self._watch())
        try:
            with self.turn:
                async for piece in self.turn.pieces():
                    if piece is not None:
                        self._saw(piece)
                        said[piece.index].add(piece)
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        except Exception:
            self._failed = True
            raise
        finally:
            watch.cancel()
            self.close()
        return json_response(self.answer.whole(said, self.turn.choices, self.turn.usage))

    def streamed(self, keep_alive_s: float) -> Response:
        """一边生成一边答；``keep_alive_s`` 秒没有东西可发，就发一行注释。"""
        return _EventStream(self, keep_alive_s)

    async def events(self, keep_alive_s: float) -> AsyncIterator[bytes]:
        """SSE 的各个事件；开始之后出的错也是一个事件。"""
        for block in self.answer.began(len(self.turn.choices), self.turn.usage):
            yield block
        try:
            async for piece in self.turn.pieces(keep_alive_s):
                if piece is None:
                    yield b": keep-alive\n\n"
                    continue
                self._saw(piece)
                for block in self.answer.said(piece):
                    yield block
            last = self.answer.ended(self.turn.choices, self.turn.usage)
        except (ApiError, DsxError) as error:
            self._failed = True
            last = self.answer.failed(error if isinstance(error, ApiError) else ApiError.of(error))
        except Exception:  # dsx 的缺陷：traceback 留在日志里，客户端也不能白等
            self._failed = True
            logger.exception("流式回答出错")
            last = self.answer.failed(ApiError(500, "服务内部出错", code="internal_error"))
        for block in last:
            yield block

    def close(self) -> None:
        """记下各个回答怎么结束的；调一次。"""
        cut = "error" if self._failed else "abort"
        reasons = [choice.finish or cut for choice in self.turn.choices]
        for reason in reasons:
            self._metrics.ended(reason)
        usage: Mapping[str, Any] = self.turn.usage
        note(
            self._request.scope,
            model=self.answer.model,
            prompt=usage["prompt_tokens"],
            cached=usage["prompt_tokens_details"]["cached_tokens"],
            new=usage["completion_tokens"],
            finish=",".join(reasons),
        )
        if self._first_s is not None:
            note(self._request.scope, ttft=f"{self._first_s:.3f}")

    def _saw(self, piece: Piece) -> None:
        self._metrics.saw(piece)
        if piece.first and self._first_s is None:
            self._first_s = piece.waited

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.turn.abandon()


class _EventStream(StreamingResponse):
    """SSE；不管怎么离开（答完、客户端走了、还没开始就断了），没做完的都取消。"""

    def __init__(self, reply: Reply, keep_alive_s: float) -> None:
        super().__init__(
            reply.events(keep_alive_s),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._reply.turn:
                await super().__call__(scope, receive, send)
        finally:
            self._reply.close()
