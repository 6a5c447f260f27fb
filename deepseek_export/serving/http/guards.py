"""路由之外的几层 ASGI：每个请求记一行日志、核对密钥、限制请求体。

不用 ``BaseHTTPMiddleware``：它让流式的回答看不到客户端走了。
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from time import perf_counter
from typing import Any
from urllib.parse import quote

from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.metrics import Metrics
from deepseek_export.serving.http.problems import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: 请求体至多多少字节：几十万 token 的提示词也放得下。
MAX_BODY = 16 << 20
#: 请求体至多等多少秒。
BODY_S = 30.0
#: 探针：不要密钥，也不记日志。
PROBES = frozenset({"/health", "/ready"})
#: 不要密钥的：试用的那一页里没有秘密，密钥由它的用户填。
OPEN = PROBES | {"/"}
#: scope 里放日志要的东西的键，见 :func:`note`。
_NOTE = "dsx.note"
_OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

logger = logging.getLogger("dsx.serve")


def note(scope: Scope, **fields: object) -> None:
    """给这个请求的那行日志添几项；不放提示词与回答。"""
    scope.get(_NOTE, {}).update(fields)


def headers(scope: Scope) -> dict[bytes, bytes]:
    """请求的头，名字是小写的。"""
    return dict(scope["headers"])


class RequestLog:
    """每个请求一行：id、方法、路径、状态、用时，与 :func:`note` 添的；id 也在回答的 ``x-request-id`` 里。

    客户端自己给了 ``x-request-id`` 而写法规矩，就用它的。
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        given = headers(scope).get(b"x-request-id", b"").decode("latin-1")
        name = given if _OWN_ID.fullmatch(given) else secrets.token_hex(8)
        began, status = perf_counter(), 500
        noted: dict[str, object] = {}
        scope[_NOTE] = noted

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            took = perf_counter() - began
            if "model" in noted:  # 生成的请求才有
                self._metrics.of(str(noted["model"])).answered(took)
            # 路径是客户端给的：换行之类写成 %0A，一个请求只能占一行。
            fields = "".join(f" {key}={value}" for key, value in noted.items())
            path = quote(scope["path"])
            logger.info("%s %s %s %d%s total=%.3f", name, scope["method"], path, status, fields, took)


def _credentials(scope: Scope) -> bytes | None:
    """``Authorization``；没有就看 Anthropic 的 ``x-api-key``。"""
    given = headers(scope)
    key = given.get(b"x-api-key")
    return given.get(b"authorization") or (None if key is None else b"Bearer " + key)


class RequireKey:
    """没有密钥的请求答 401；探针与跨域的预检除外。"""

    def __init__(self, app: App, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_to_all = scope["type"] != "http" or scope["path"] in OPEN
        if open_to_all or self._keys.admits(_credentials(scope)):
            await self._app(scope, receive, send)
            return
        refused = ApiError(
            401,
            "API 密钥不对，或没有给：要 Authorization: Bearer 密钥，或 x-api-key: 密钥",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refused.answer(scope.get("path", ""))(scope, receive, send)


class LimitBody:
    """请求体先整个收下：太大答 413，太慢答 408；都在解析之前。

    Args:
        app: 里面一层。
        limit: 至多多少字节。
        seconds: 至多等多少秒。
    """

    def __init__(self, app: App, limit: int = MAX_BODY, seconds: float = BODY_S) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            declared = headers(scope).get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self._limit:
                raise self._too_large()
            async with asyncio.timeout(self._seconds):
                body = await self._whole(receive)
        except TimeoutError:
            slow = ApiError(408, f"请求体 {self._seconds:g} 秒还没有收完", code="request_timeout")
            await slow.answer(scope.get("path", ""))(scope, receive, send)
            return
        except ApiError as error:
            await error.answer(scope.get("path", ""))(scope, receive, send)
            return
        pending = iter([body])

        async def replay() -> Message:
            # 收下的先给；之后接着问外面，那里会说客户端走了没有。
            return next(pending, None) or await receive()

        await self._app(scope, replay, send)

    async def _whole(self, receive: Receive) -> Message:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limit:
                raise self._too_large()
            more = message.get("more_body", False)
        return {"type": "http.request", "body": b"".join(parts), "more_body": False}

    def _too_large(self) -> ApiError:
        return ApiError(413, f"请求体超过 {self._limit} 字节", code="request_too_large")


def wrapped(app: App, layers: Iterable[Callable[[App], App]]) -> App:
    """从里往外一层层包起来。"""
    for layer in layers:
        app = layer(app)
    return app
