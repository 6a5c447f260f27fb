"""各个端点。"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from deepseek_export.errors import DsxError
from deepseek_export.serving.http import messages, responses
from deepseek_export.serving.http.answers import Answer, Answering, ChatForm, CompletionForm
from deepseek_export.serving.http.guards import App, LimitBody, RequestLog, RequireKey, note, wrapped
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.message_events import MessagesAnswer
from deepseek_export.serving.http.messages import CountRequest, MessagesRequest
from deepseek_export.serving.http.metrics import Metrics
from deepseek_export.serving.http.page import PAGE, PAGE_HEADERS
from deepseek_export.serving.http.problems import ApiError, json_response
from deepseek_export.serving.http.respond import KEEP_ALIVE_S, Reply
from deepseek_export.serving.http.response_events import ResponsesAnswer
from deepseek_export.serving.http.responses import ResponsesRequest
from deepseek_export.serving.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    TokenizeRequest,
)
from deepseek_export.serving.http.service import ServedModel, Service
from deepseek_export.serving.http.slots import slots_router
from deepseek_export.serving.http.turn import Order, Turn
from deepseek_export.version import __version__

_Result = TypeVar("_Result")


def create_app(
    service: Service,
    keys: KeyRing | None = None,
    cors_origins: Sequence[str] = (),
    keep_alive_s: float = KEEP_ALIVE_S,
    log_prompts: bool = False,
    slot_folder: Path | None = None,
) -> App:
    """整个 ASGI 应用；模型可以以后才就绪。

    Args:
        service: 服务。
        keys: 认得的密钥；``None`` 谁都放行。
        cors_origins: 允许哪些网页跨域来用；缺省一个也不许。
        keep_alive_s: 流式的回答这么多秒没有东西可发，就发一行注释。
        log_prompts: 日志里写上提示词。
        slot_folder: ``/slots`` 的文件放在哪里；``None`` 不许存、不许恢复。
    """
    metrics = Metrics(service)
    # 文档页要从外面的 CDN 取脚本，不开。
    app = FastAPI(title="dsx serve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _explain_errors(app)
    _add_generation(app, service, metrics, keep_alive_s, log_prompts)
    _add_tokenizer(app, service)
    _add_status(app, service, metrics)
    app.include_router(slots_router(service.named, slot_folder))
    layers: list[Callable[[App], App]] = [LimitBody, partial(RequireKey, keys=keys or KeyRing())]
    if cors_origins:
        layers.append(partial(allow_origins, origins=cors_origins))  # 在密钥之外：预检请求不带密钥
    return wrapped(app, [*layers, partial(RequestLog, metrics=metrics)])


def allow_origins(app: App, origins: Sequence[str]) -> App:
    """允许这些网页跨域来用。"""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )


def _add_generation(
    app: FastAPI, service: Service, metrics: Metrics, keep_alive_s: float, log_prompts: bool
) -> None:
    async def reply(
        request: Request,
        body: Sampled,
        source: str,
        orders: Callable[[ServedModel], list[Order]],
        answer: Callable[[str], Answering],
    ) -> Response:
        model = service.named(body.checked().model)
        try:
            wanted = await _in_thread(partial(orders, model))
        except DsxError as error:
            raise ApiError.of(error, source) from error
        if log_prompts:
            texts = [model.tokenizer.decode(order.prompt) for order in wanted if order.copy == 0]
            note(request.scope, text=repr(texts))  # repr：看不见的字符都转义，一个请求仍是一行
        turn = Turn(model.engine, model.tokenizer, wanted)
        turn.submit()
        answering = Reply(turn, answer(model.name), request, metrics)
        return answering.streamed(keep_alive_s) if body.stream else await answering.whole()

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        answer = partial(Answer, CompletionForm(), usage_chunk=body.include_usage)
        return await reply(request, body, "prompt", lambda model: model.completion_orders(body), answer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        answer = partial(Answer, ChatForm(), usage_chunk=body.include_usage)
        return await reply(request, body, "messages", lambda model: model.chat_orders(body), answer)

    @app.post("/v1/responses")
    async def respond(request: Request, body: ResponsesRequest) -> Response:
        asked = body.chat()
        with _renaming(responses.RENAMED):
            answer = partial(ResponsesAnswer, body)
            return await reply(request, asked, "messages", lambda model: model.chat_orders(asked), answer)

    @app.post("/v1/messages")
    async def message(request: Request, body: MessagesRequest) -> Response:
        asked = body.chat()
        with _renaming(messages.RENAMED):
            orders = partial(ServedModel.chat_orders, body=asked)
            return await reply(request, asked, "messages", orders, MessagesAnswer)

    @app.post("/v1/messages/count_tokens")
    async def count(body: CountRequest) -> Response:
        asked = body.chat()
        with _renaming(messages.RENAMED):
            model = service.named(asked.checked().model)
            ids = await _in_thread(lambda: model.tokenizer.encode(model.formats.text(asked)))
        return json_response({"input_tokens": len(ids)})


@contextmanager
def _renaming(names: Mapping[str, str]) -> Iterator[None]:
    """别的协议的端点：错误里的字段用它自己的名字。"""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from error


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        model = service.named(body.model)
        if body.messages is not None:
            messages = body.messages
            ids = await _in_thread(lambda: model.tokenizer.encode(model.chat_text(messages)))
        elif body.prompt is not None:
            ids = await _in_thread(partial(model.tokenizer.encode, body.prompt))
        else:
            raise ApiError(400, "prompt 与 messages 都没有给", param="prompt")
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        model = service.named(body.model)
        for token in body.tokens:
            if token >= model.session.vocab_size:
                what = f"token id {token} 不在词表里，词表有 {model.session.vocab_size} 个"
                raise ApiError(400, what, param="tokens")
        return json_response({"prompt": await _in_thread(partial(model.tokenizer.decode, body.tokens))})


def _add_status(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def card(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "dsx",
            "max_model_len": model.context,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card(model) for model in service.ready().values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(card(service.named(name)))

    @app.get("/")
    async def page() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        service.healthy()
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        service.healthy()  # 试跑过一个 token 才有模型
        return json_response({"status": "ready"})

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _explain_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.answer(request.url.path)

    @app.exception_handler(DsxError)
    async def dsx_error(request: Request, error: DsxError) -> Response:
        return ApiError.of(error).answer(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors()[0]).answer(request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        return ApiError(error.status_code, f"{request.method} {path}：{error.detail}").answer(path)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return ApiError(500, "服务内部出错", code="internal_error").answer(request.url.path)


def _invalid(first: dict[str, Any]) -> ApiError:
    """pydantic 的一条错误；只说字段与原因，不把值抄回去。"""
    if first["type"] == "json_invalid":
        return ApiError(400, "请求体不是合法的 JSON", code="invalid_json")
    path = first["loc"][1:]
    if not path:
        return ApiError(400, "请求体要是 JSON 对象，Content-Type 要是 application/json", code="invalid_body")
    # 联合类型会在路径里添上分支的名字，例如 prompt.list[str].0。
    param = ".".join(map(str, takewhile(_is_field, path)))
    reason = "没有这个字段" if first["type"] == "missing" else first["msg"]
    return ApiError(400, f"{param}：{reason}", param=param, code="invalid_value")


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part != "str")


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """分词、套模板不占着事件循环。"""
    return await asyncio.to_thread(work)
