"""请求不成时答什么：OpenAI 的错误格式，以及 dsx 的错误码各对应哪个状态码。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import Response

from deepseek_export.errors import DsxError

#: 排队满了，多少秒之后再试。
RETRY_AFTER_S = 1

#: 请求自己不对的码，都是 400：输入不对的，别的字段不对的。两处都没有的是服务这边的事。
_INPUT_CODES = frozenset({"DSX-E502", "DSX-E503", "DSX-E509", "DSX-E510", "DSX-E511", "DSX-E702"})
_INPUT_CODES |= {"DSX-E760", "DSX-E763", "DSX-E764", "DSX-E765"}
_FIELD_CODES = frozenset({"DSX-E504", "DSX-E512", "DSX-E518", "DSX-E532", "DSX-E533", "DSX-E534", "DSX-E762"})
#: 这里的端点用 Anthropic 的格式。
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_KINDS = MappingProxyType(
    {
        401: "authentication_error",
        404: "not_found_error",
        413: "request_too_large",
        503: "overloaded_error",
    }
)
#: 模型断了，自己会起来：过一会儿再来。
_RETRY_CODES = frozenset({"DSX-E742", "DSX-E743", "DSX-E747"})
#: OpenAI 的客户端认得的名字；别的用 dsx 的码。
_KNOWN_NAMES = MappingProxyType({"DSX-E511": "context_length_exceeded"})


class ApiError(Exception):
    """要原样答给客户端的错误。

    Args:
        status: HTTP 状态码。
        message: 给人看的。
        param: 哪个字段，例如 ``messages.0.role``。
        code: 给程序看的。
        headers: 另加的头。
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: DsxError, source: str | None = None) -> ApiError:
        """``DsxError`` 变成答给客户端的；``source`` 是输入的字段：``messages`` 或 ``prompt``。"""
        message = f"{error.code} {error.title}：{error.what}。{error.todo}"
        code = _KNOWN_NAMES.get(error.code, error.code)
        if error.code in _INPUT_CODES | _FIELD_CODES:
            return cls(400, message, param=source if error.code in _INPUT_CODES else None, code=code)
        if error.code == "DSX-E530":
            return cls(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})
        if error.code in _RETRY_CODES:  # 哪个进程怎么死的，是给管服务的人看的
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            return cls(503, f"{error.code} {error.title}", code=code, headers=retry)
        if error.code == "DSX-E531":  # 里面有内部错误的原文，那是给管服务的人看的
            return cls(503, f"{error.code} {error.title}", code=code)
        return cls(500, message, code=code)

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``。"""
        if self.status == 401:
            kind = "authentication_error"
        elif self.status == 404:
            kind = "not_found_error"
        elif self.status == 503:
            kind = "unavailable_error"
        else:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    @property
    def anthropic(self) -> dict[str, Any]:
        """Anthropic 的格式。"""
        kind = _ANTHROPIC_KINDS.get(
            self.status, "invalid_request_error" if self.status < 500 else "api_error"
        )
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def answer(self, path: str) -> Response:
        """整个回答，格式由端点的路径定。"""
        body = self.anthropic if path.startswith(ANTHROPIC_PATH) else self.body
        return json_response(body, self.status, self.headers)

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """字段换一个名字：别的协议里它叫什么。"""
        new = names.get(self.param or "")
        if self.param is None or new is None:
            return self
        message = self.message.replace(self.param, new)
        return ApiError(self.status, message, param=new, code=self.code, headers=self.headers)


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """紧凑的 UTF-8 JSON，没有换行；落单的代理项（请求里可以有）换成问号。"""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(
    body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON 的回答。"""
    return Response(json_bytes(body), status, headers, media_type="application/json")
