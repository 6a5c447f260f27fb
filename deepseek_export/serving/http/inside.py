"""不经过网络，在本进程里问自己的 ASGI 应用：批量与服务因此是同样的回答。"""

from __future__ import annotations

import asyncio
from typing import Any

from deepseek_export.serving.http.app import create_app
from deepseek_export.serving.http.guards import App
from deepseek_export.serving.http.service import ServedModel, Service


def app_of(model: ServedModel, log_prompts: bool = False) -> App:
    """只有这一个模型、谁都放行的应用。"""
    service = Service()
    service.models = {model.name: model}
    return create_app(service, log_prompts=log_prompts)


async def post(app: App, path: str, body: bytes) -> tuple[int, bytes]:
    """POST 一个 JSON，等整个回答。

    Returns:
        状态码与回答的内容。
    """
    sent: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    got: dict[str, Any] = {"status": 500, "body": b""}

    async def receive() -> dict[str, Any]:
        if not sent:
            await asyncio.Event().wait()  # 这个客户端不会先走；答完了由取消来结束
        return sent.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            got["status"] = message["status"]
        elif message["type"] == "http.response.body":
            got["body"] += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return got["status"], got["body"]
