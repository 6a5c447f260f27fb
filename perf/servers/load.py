"""闭环的客户端：几个客户同时各要一个回答，答完再要下一个；记下每一段文本到的时刻。"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np

#: 一个请求至多等多久，秒。
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Job:
    """一个请求。

    Attributes:
        prompt: 提示词的 token id。
        new_tokens: 要几个新 token，遇 EOS 不停。
        salt: 只与同样的共用前缀；空串是缺省。
    """

    prompt: list[int]
    new_tokens: int
    salt: str = ""


@dataclass(frozen=True)
class Heard:
    """一个请求听到的。

    Attributes:
        sent: 发出的时刻，``perf_counter`` 的秒数。
        arrivals: 各段文本到的时刻。
        tokens: 一共几个新 token，照服务自己报的用量。
    """

    sent: float
    arrivals: list[float]
    tokens: int

    @property
    def first_s(self) -> float:
        """从发出到第一段文本。"""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """相邻两段文本之间。"""
        return np.diff(self.arrivals).tolist()


Ask = Callable[[Job], Heard]


def jobs(
    count: int, prompt: tuple[int, int], new_tokens: tuple[int, int], vocab_size: int, seed: int
) -> list[Job]:
    """长度与内容都由种子定的请求；长度在各自的范围里均匀取。"""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(rng.integers(prompt[0], prompt[1] + 1))
        made.append(
            Job(
                rng.integers(2, vocab_size, size).tolist(),
                int(rng.integers(new_tokens[0], new_tokens[1] + 1)),
            )
        )
    return made


@dataclass(frozen=True)
class Measured:
    """一遍闭环的结果，可以写成 JSON。

    Attributes:
        token_s: 全程的秒数除以全部新 token。
        first_s: 从发出到第一段文本的中位数。
        gap_p50_s, gap_p95_s: 相邻两段文本之间的中位数与 95 分位；每个回答都只有一段时没有间隔，是 ``None``。
        tokens: 全部新 token。
    """

    token_s: float
    first_s: float
    gap_p50_s: float | None
    gap_p95_s: float | None
    tokens: int


def closed_loop(ask: Ask, todo: Sequence[Job], clients: int) -> Measured:
    """``clients`` 个客户把 ``todo`` 做完。

    Raises:
        RuntimeError: 有一个请求失败了，或给的 token 数不对。
    """
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in todo:
        waiting.put(job)
    heard: list[Heard] = []
    failures: list[BaseException] = []

    def client() -> None:
        try:
            while not failures:
                job = waiting.get_nowait()
                answer = ask(job)
                if answer.tokens != job.new_tokens:
                    raise RuntimeError(f"要 {job.new_tokens} 个新 token，得到 {answer.tokens} 个")
                heard.append(answer)
        except Empty:
            return
        except BaseException as error:  # 线程里的错误交给调用方
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = perf_counter() - began
    if failures:
        raise RuntimeError(f"闭环里有请求失败：{failures[0]}") from failures[0]
    gaps = [gap for one in heard for gap in one.gaps]
    tokens = sum(one.tokens for one in heard)
    # 慢的客户一次读到快的服务已经写下的全部：一段里有几个 token，段与段之间就少几个间隔。
    middle, tail = np.percentile(gaps, (50, 95)).tolist() if gaps else (None, None)
    first = float(np.median([one.first_s for one in heard]))
    return Measured(seconds / tokens, first, middle, tail, tokens)


def over_http(url: str, model: str) -> Ask:
    """经 OpenAI 的 ``/v1/completions``（流式）。

    Args:
        url: 服务的地址。
        model: 模型名。
    """
    address = urlsplit(url)

    def ask(job: Job) -> Heard:
        body: dict[str, Any] = {
            "model": model,
            "prompt": job.prompt,
            "max_tokens": job.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if job.salt:
            body["cache_salt"] = job.salt
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_PATIENCE_S)
        try:
            sent = perf_counter()
            payload, headers = json.dumps(body), {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", payload, headers)
            return _listen(connection.getresponse(), sent)
        finally:
            connection.close()

    return ask


def _listen(response: http.client.HTTPResponse, sent: float) -> Heard:
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}：{response.read(2000).decode(errors='replace')}")
    arrivals: list[float] = []
    tokens = 0
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"流里的错误：{chunk['error']}")
        if any(choice.get("text") for choice in chunk.get("choices", ())):
            arrivals.append(perf_counter())
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
    return Heard(sent, arrivals, tokens)
