"""真的服务，开在本机的一个空闲端口上，跑在本进程的一个线程里。"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

import deepseek_export
from deepseek_export.model import CompiledModel
from deepseek_export.serving import Engine, EngineSettings
from deepseek_export.serving.http.server import Server, listen, serve, url_of
from deepseek_export.serving.http.service import ServedModel

#: 服务里的模型名。
NAME = "demo"
CHAT = [{"role": "user", "content": "《论语》"}]
TEXT = "And it came to pass"
#: 长得几秒也跑不完，用来占住引擎。
LONG = {"prompt": TEXT, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def opened(
    model: CompiledModel, name: str = NAME, tool_parser: str | None = None, **settings: Any
) -> ServedModel:
    """加载好的模型开成服务；之后它的会话归引擎。"""
    engine = model.engine(EngineSettings(**settings))
    return ServedModel.open(name, model.tokenizer, model.session, engine, tool_parser)


def loader(bundle: Path, **settings: Any) -> Callable[[], ServedModel]:
    """加载 ``bundle``，两个线程；参数见 :func:`opened`。"""
    return lambda: opened(deepseek_export.load(bundle, threads=1), **settings)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """等到 ``true()`` 为真；等不到就失败。"""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "等不到"
        time.sleep(0.005)


class Running:
    """开着的服务；要写成 ``with``。

    Args:
        load: 加载模型。
        wait: 等到就绪。
        more: 另外几个模型。
        options: 交给 :class:`Server`。

    Attributes:
        url: ``http://127.0.0.1:端口``。
        client: 连着它的 httpx 客户端。
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        wait: bool = True,
        more: Sequence[Callable[[], ServedModel]] = (),
        **options: Any,
    ) -> None:
        self.server = Server([load, *more], **options)
        self._socket = listen("127.0.0.1", 0)
        self.url = url_of(self._socket)
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._wait = wait
        self._thread = threading.Thread(target=serve, args=(self.server, self._socket), name="serve")

    def __enter__(self) -> Self:
        self._thread.start()
        if self._wait:
            until(lambda: self.get("/ready").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        # 服务停了，引擎也关了。
        assert not any(model.engine.healthy for model in self.server.service.models.values())

    @property
    def served(self) -> ServedModel:
        """服务的（头一个）模型。"""
        return next(iter(self.server.service.models.values()))

    @property
    def engine(self) -> Engine:
        """服务的（头一个）引擎。"""
        return next(iter(self.server.service.models.values())).engine

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET。"""
        return self.client.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST 一个 JSON。"""
        return self.client.post(path, json=body, **options)

    def tasks(self) -> int:
        """事件循环里有几个任务；这一问自己的不算。"""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        loop = self.server.servers[0].get_loop()
        return asyncio.run_coroutine_threadsafe(count(), loop).result(10)

    def idle(self) -> None:
        """等到引擎里什么也没有。"""
        until(lambda: (self.engine.stats.running, self.engine.stats.waiting) == (0, 0))


def events(text: str) -> list[Any]:
    """SSE 的各个 ``data``；``[DONE]`` 必须是最后一个，去掉；注释不算。"""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def alone(model: CompiledModel, prompt: str, chat: bool = False, **options) -> str:
    """生成器单独跑的文本。"""
    result = model.generate(prompt, chat=chat, **options)
    assert result.text is not None
    return result.text[0]


class Scripted:
    """照着 ``ids`` 一个一个说下去的模型，从长 ``begin`` 的提示词之后开始。"""

    def __init__(self, run, begin: int, ids: list[int]) -> None:
        self._run, self._begin, self._ids = run, begin, ids

    def __call__(self, input_ids, past_lens, logits_positions, caches):
        logits = self._run(input_ids, past_lens, logits_positions, caches)
        at = (past_lens[:, None] + logits_positions + 1 - self._begin).tolist()
        for row, positions in enumerate(at):
            for column, position in enumerate(positions):
                logits[row, column, self._ids[min(max(position, 0), len(self._ids) - 1)]] = 1e9
        return logits
