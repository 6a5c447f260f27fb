"""几个副本前面的入口：收 HTTP，交给一个副本里的应用，回答原样递回去；还没有开始答就断了、忙了的，换一个副本再来。

它自己不加载模型，也不认得 Ray：交给谁由 :class:`Replicas` 去办。副本里是与 ``dsx serve`` 同一个应用，所以回答相同。
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from fastapi import Response

from deepseek_export.serving.http.affinity import Hint, affinity_key
from deepseek_export.serving.http.app import allow_origins
from deepseek_export.serving.http.guards import App, LimitBody, Receive, RequireKey, Scope, Send, wrapped
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.metrics import merged
from deepseek_export.serving.http.problems import RETRY_AFTER_S, ApiError

Message = Mapping[str, Any]

#: 副本收下一个请求，至多等这么多秒。
ACCEPT_S = 15.0
#: 一个请求至多换几个副本。
_MOST_TRIES = 8
#: 请求体大于这么多字节，在别的线程里看它的开头。
_LARGE = 1 << 16
#: 交给副本的 scope 里有这些。
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")


class Replicas(Protocol):
    """副本们。"""

    def ask(self, hint: Hint, scope: Mapping[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """交给一个副本；先给 ``{"type": "replica", "name": …}``，再是它的应用发的各条 ASGI 消息。

        Raises:
            ReplicaLost: 副本没有了。
        """


class ReplicaLost(Exception):
    """副本没有了，或没有收下。"""


def create_front(replicas: Replicas, keys: KeyRing | None = None, cors_origins: Sequence[str] = ()) -> App:
    """入口的 ASGI 应用；密钥、请求体的上限、跨域都在这里。

    Args:
        replicas: 副本们。
        keys: 认得的密钥；``None`` 谁都放行。
        cors_origins: 允许哪些网页跨域来用。
    """
    layers: list[Callable[[App], App]] = [LimitBody, partial(RequireKey, keys=keys or KeyRing())]
    if cors_origins:
        layers.append(partial(allow_origins, origins=cors_origins))
    return wrapped(Front(replicas), layers)


class Front:
    """见模块的说明。

    Args:
        replicas: 副本们。
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, body = scope["path"], (await receive()).get("body", b"")
        if path == "/slots" or path.startswith("/slots/"):
            refused = ApiError(404, "几个副本各有各的槽，这里没有 /slots", code="not_found")
            await refused.answer(path)(scope, receive, send)
            return
        work = self._metrics(scope, receive, send) if path == "/metrics" else self._relay(scope, body, send)
        await _unless_gone(work, receive)

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        """换着副本试，到有一个开始答了为止。"""
        look = partial(affinity_key, body)
        key = await asyncio.to_thread(look) if len(body) > _LARGE else look()
        tried: tuple[str, ...] = ()
        lost = 0
        held: list[Message] = []
        for _ in range(_MOST_TRIES):
            attempt = _Attempt(self._replicas, Hint(key, tried, lost), scope, body)
            refusal = await attempt.run(tried, send)
            if attempt.answered:
                return
            held = refusal or held
            if attempt.name is None:
                lost += 1  # 没有收下，是哪一个也不知道：下一次轮到别的
            elif attempt.name in tried:
                break  # 都试过了
            else:
                tried = (*tried, attempt.name)
        for message in held or await _busy(scope):
            await send(dict(message))

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """每个副本的都问到，合在一起，多一个 ``replica`` 标签。"""
        found: dict[str, bytes] = {}
        lost = 0
        for _ in range(_MOST_TRIES):
            said: list[Message] = []

            async def keep(message: Any, said: list[Message] = said) -> None:
                said.append(message)

            attempt = _Attempt(self._replicas, Hint("", tuple(found), lost), scope, b"")
            await attempt.run(tuple(found), keep)
            if attempt.name in found:
                break
            lost += attempt.name is None
            if attempt.name is not None and attempt.answered:
                found[attempt.name] = b"".join(one.get("body", b"") for one in said[1:])
        kind = "text/plain; version=0.0.4; charset=utf-8"
        await Response(merged(found, "replica"), media_type=kind)(scope, receive, send)


class _Attempt:
    """交给一个副本一次。

    Attributes:
        name: 哪个副本收下的；没有收下是 ``None``。
        answered: 它开始答了，递出去了。
    """

    def __init__(self, replicas: Replicas, hint: Hint, scope: Scope, body: bytes) -> None:
        self.name: str | None = None
        self.answered = False
        self._asked = replicas.ask(hint, {key: scope[key] for key in _SCOPE}, body)

    async def run(self, tried: Sequence[str], send: Send) -> list[Message]:
        """递到底；它答 503 就不递，返回它答的；收下的是试过的那个，就不听了。

        Raises:
            ReplicaLost: 递了一半，副本没有了。
        """
        held: list[Message] = []
        async with aclosing(self._asked) as messages:
            try:
                first = await asyncio.wait_for(anext(messages), ACCEPT_S)
                self.name = first["name"]
                if self.name in tried:
                    return []
                async for message in messages:
                    if held or message.get("status") == 503:
                        held.append(message)
                        continue
                    self.answered = True
                    await send(dict(message))
            except (ReplicaLost, TimeoutError, StopAsyncIteration):
                if self.answered:
                    raise
                return []
        return held


async def _unless_gone(work: Any, receive: Receive) -> None:
    """做完 ``work``；客户端先走了就取消它。"""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped = not doing.done()
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)
    if not stopped:
        doing.result()


async def _busy(scope: Scope) -> list[Message]:
    """一个副本也没有收下时答的。"""
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    answer = ApiError(503, "没有副本收得下，过一会儿再来", code="no_replica", headers=retry)
    said: list[Message] = []

    async def keep(message: Any) -> None:
        said.append(message)

    async def nothing() -> Any:
        return {"type": "http.disconnect"}

    await answer.answer(scope["path"])(scope, nothing, keep)
    return said
