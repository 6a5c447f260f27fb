"""监听、加载、停下：``dsx serve`` 的一生。"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from time import perf_counter
from types import FrameType

import uvicorn

from deepseek_export.errors import DsxError
from deepseek_export.serving.http.app import create_app
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.respond import KEEP_ALIVE_S
from deepseek_export.serving.http.service import ServedModel, Service

#: 立刻停下时，留给没有做完的回答说一声的秒数。
_LAST_WORDS_S = 1.0

logger = logging.getLogger("dsx.serve")


def listen(host: str, port: int) -> socket.socket:
    """占住地址；``port`` 为 0 由系统挑一个。

    Raises:
        DsxError: ``DSX-E731``，解析不了、被占着或没有权限。
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except BaseException:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DsxError(
            "DSX-E731", f"{host}:{port}：{reason}", "换一个 --port（0 由系统挑），或换 --host"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """监听着的地址，``http://127.0.0.1:8000``。"""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """一个服务：先监听，模型在后台加载，期间 ``/health`` 答 503。

    第一个 SIGTERM（或 Ctrl-C）不再收新的，正在做的做完；第二个把正在做的也停下。

    Args:
        loads: 加载各个模型，在另一个线程里依次调；全部就绪才算就绪。
        keys: 认得的密钥。
        cors_origins: 允许哪些网页跨域来用。
        keep_alive_s: 流式的回答这么多秒没有东西可发，就发一行注释。
        log_prompts: 日志里写上提示词。
        slot_folder: ``/slots`` 的文件放在哪里；``None`` 不许存、不许恢复。
    """

    def __init__(
        self,
        loads: Sequence[Callable[[], ServedModel]],
        keys: KeyRing | None = None,
        cors_origins: Sequence[str] = (),
        keep_alive_s: float = KEEP_ALIVE_S,
        log_prompts: bool = False,
        slot_folder: Path | None = None,
    ) -> None:
        self.service = Service()
        self._loads = loads
        self._loader: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        app = create_app(self.service, keys, cors_origins, keep_alive_s, log_prompts, slot_folder)
        # 写明用哪个解析器：装了 ray[serve] 就有 httptools，缺省的会跟着变。
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, http="h11", ws="none", lifespan="off"
        )
        super().__init__(config)

    @property
    def loading(self) -> bool:
        """加载的线程还在跑；停下之后也可能：它停不下来。"""
        return self._loader is not None and self._loader.is_alive()

    async def run_on(self, listening: socket.socket) -> None:
        """服务到停下为止；引擎随之关掉。

        Raises:
            DsxError: 模型加载不了的原因。
        """
        began, self._loop = perf_counter(), asyncio.get_running_loop()
        loading: Future[list[ServedModel]] = Future()
        # 不拦着退出：加载一个大模型要几分钟，这时要停就停。
        self._loader = threading.Thread(
            target=_settle, args=(loading, self._loads), name="dsx-load", daemon=True
        )
        self._loader.start()
        loaded = asyncio.ensure_future(self._loaded(loading, began))
        try:
            await self.serve(sockets=[listening])
        finally:
            if not loaded.done():
                loaded.cancel()
                _drop(loading)
            self.service.close()
            if loaded.done() and not loaded.cancelled():
                loaded.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """收到信号：打断着主线程里别的代码，自己也会被下一个信号打断，所以只改标志，其余的交给事件循环。"""
        again = self.should_exit
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signalled, signal.Signals(sig).name, again)

    def _signalled(self, name: str, again: bool) -> None:
        if not again:
            logger.info("收到 %s：不再收新的请求，做完手上的就停；再来一次立刻停", name)
            return
        logger.info("再次收到 %s：立刻停下", name)
        # 没有做完的回答以错误结束；客户端连这也不收的，过一会儿就不管了。
        self.service.close(timeout=0)
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, setattr, self, "force_exit", True)

    async def _loaded(self, loading: Future[list[ServedModel]], began: float) -> None:
        try:
            models = await asyncio.wrap_future(loading)
        except BaseException:
            self.should_exit = True
            raise
        self.service.models = {model.name: model for model in models}
        for model in models:
            for line in model.engine.notes:
                logger.info("%s：%s", model.name, line)
        logger.info("%s 就绪，用了 %.1f 秒", "、".join(self.service.models), perf_counter() - began)


def serve(server: Server, listening: socket.socket) -> None:
    """在本线程里跑一个事件循环，到停下为止。

    Raises:
        DsxError: 模型加载不了的原因。
    """
    asyncio.run(server.run_on(listening))


def _settle(loading: Future[list[ServedModel]], loads: Sequence[Callable[[], ServedModel]]) -> None:
    """依次加载；有一个不成，或者不要了，加载好的都关掉。"""
    models: list[ServedModel] = []
    try:
        for load in loads:
            if loading.cancelled():
                break
            models.append(load())
    except BaseException as error:
        _close(models)
        if not loading.cancelled():
            loading.set_exception(error)
        return
    try:
        loading.set_result(models)
    except InvalidStateError:  # 这期间不要了
        _close(models)


def _drop(loading: Future[list[ServedModel]]) -> None:
    """不要了：还在加载的由 :func:`_settle` 关掉；恰好加载完、还没有交给服务的，在这里关。"""
    if not loading.cancel() and loading.exception() is None:
        _close(loading.result())


def _close(models: Sequence[ServedModel]) -> None:
    for model in models:
        model.engine.close(drain=False)
