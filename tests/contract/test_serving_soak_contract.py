"""specs/serving：一千个请求，有的中途走了、等不及、写坏了；之后什么也没有留下，答了的都对。"""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import deepseek_export
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.model import CompiledModel
from deepseek_export.serving import Request
from tests.serving_http import Running, events, loader

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

TEXTS = (
    "明月几时有，把酒问青天。",
    "And it came to pass",
    "《论语》",
    "1 + 1 =",
    "学而时习之，不亦说乎？有朋自远方来",
)
BAD: tuple[tuple[int, Any], ...] = (
    (400, b"{"),
    (400, b"[]"),
    (400, {"prompt": 7}),
    (400, {"prompt": ""} | {"max_tokens": 0}),
    (400, {"prompt": "长" * 5000}),
    (400, {"prompt": "x", "temperature": -1}),
    (404, {"prompt": "x", "model": "no such model"}),
)
_MIB = 1 << 20


@dataclass(frozen=True)
class Play:
    """一个请求怎么演。

    Attributes:
        body: 请求体。
        want: 应得的文本；写坏了的是状态码。
        way: ``whole``、``stream``、``leave`` 中途走、``hurry`` 等不及、``bad`` 写坏了。
    """

    body: Any
    want: str | int
    way: str


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("soak") / "out"
    return deepseek_export.export(CHECKPOINT, out, "full", target="ort-cpu").path


def right_answers(model: CompiledModel) -> list[tuple[dict[str, Any], str]]:
    """请求体与生成器单独跑的答案；上限超过 16 的不必跑完，开头相同。"""
    found = []
    for number, (text, temperature) in enumerate(itertools.product(TEXTS, (0.0, 0.8))):
        tokens = 6 + 5 * (number % 4)
        body = {
            "prompt": text,
            "max_tokens": tokens,
            "temperature": temperature,
            "seed": number,
            "ignore_eos": True,
        }
        (ids,) = model.generate(
            [model.encode(text)],
            tokens,
            temperature=temperature,
            seed=number,
            ignore_eos=True,
            speculative=False,
        ).token_ids
        assert model.tokenizer is not None
        found.append((body, model.tokenizer.decode(ids)))
    return found


def script(answers: list[tuple[dict[str, Any], str]], count: int, seed: int) -> list[Play]:
    chance, plays = random.Random(seed), []
    for _ in range(count):
        way = chance.choices(("whole", "stream", "leave", "hurry", "bad"), (5, 5, 3, 2, 2))[0]
        if way == "bad":
            status, content = chance.choice(BAD)
            plays.append(Play(content, status, way))
        else:
            body, want = chance.choice(answers)
            more = {"cache_salt": chance.choice(("", "a"))}
            plays.append(Play(body | more | {"stream": way in ("stream", "leave")}, want, way))
    return plays


def act(client: httpx.Client, play: Play, chance: random.Random) -> str:
    """演一个；返回结果的种类。"""
    path = "/v1/completions"
    if play.way == "bad":
        given = {"content": play.body} if isinstance(play.body, bytes) else {"json": play.body}
        answer = client.post(path, headers={"Content-Type": "application/json"}, **given)
        assert answer.status_code == play.want, play
        assert answer.json()["error"]["message"]
        return "refused"
    if play.way == "hurry":
        try:
            answer = client.post(path, json=play.body, timeout=chance.choice((0.002, 0.02, 0.2)))
        except httpx.TimeoutException:
            return "gave up"
    elif play.way == "leave":
        with client.stream("POST", path, json=play.body) as answer:
            for _ in zip(answer.iter_lines(), range(chance.randrange(8)), strict=False):
                pass
        return "left"
    else:
        answer = client.post(path, json=play.body)
    if answer.status_code == 503:
        return "full"
    assert answer.status_code == 200, answer.text
    if play.way == "stream":
        text = "".join(event["choices"][0]["text"] for event in events(answer.text) if event["choices"])
    else:
        text = answer.json()["choices"][0]["text"]
    assert text == play.want, play
    return "answered"


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_is_left_behind(bundle: Path, count: int):
    """SERVE-15：没有留下请求、任务、线程、文件句柄，常驻内存不涨，槽都闲着；答了的都与生成器单独跑的相同。"""
    answers = right_answers(deepseek_export.load(bundle, threads=1))
    process = psutil.Process()
    with Running(loader(bundle, slots=4, queue=16, prefill_tokens=16)) as running:

        def everything(plays: list[Play], seed: int) -> Counter[str]:
            numbers = itertools.count(seed)

            def several(part: list[Play]) -> list[str]:
                chance = random.Random(next(numbers))
                with httpx.Client(base_url=running.url, timeout=120) as client:
                    return [act(client, play, chance) for play in part]

            with ThreadPoolExecutor(6) as pool:
                outcomes = Counter(itertools.chain(*pool.map(several, [plays[at::6] for at in range(6)])))
            running.idle()
            return outcomes

        def left() -> tuple[int, ...]:
            gc.collect()
            requests = sum(type(one) is Request for one in gc.get_objects())
            files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            # asyncio 的线程池有上限，用到几个算几个，不算漏。
            threads = [one for one in threading.enumerate() if not one.name.startswith("asyncio_")]
            return files, len(threads), running.tasks(), requests

        everything(script(answers, max(60, count // 4), seed=1), 10)  # 缓冲区、线程池都到了该有的大小
        before, resident = left(), process.memory_info().rss
        outcomes = everything(script(answers, count, seed=2), 20)
        after, grown = left(), process.memory_info().rss - resident
        print(
            outcomes, f"常驻内存涨了 {grown / _MIB:.1f} MiB，每千个请求 {grown / _MIB * 1000 / count:.1f} MiB"
        )
        assert sum(outcomes.values()) == count
        assert outcomes["answered"] > count / 3
        assert outcomes["left"] > 0
        assert outcomes["refused"] > 0
        assert all(one <= two for one, two in zip(after, before, strict=True)), (before, after)
        assert not any(state.busy for state in running.engine.slots())
        assert grown < 24 * _MIB
        stats = running.engine.stats
        assert (stats.running, stats.waiting, stats.finished["error"]) == (0, 0, 0)
        assert running.engine.healthy
        body, want = answers[0]
        assert running.post("/v1/completions", body).json()["choices"][0]["text"] == want
