"""specs/serving 的 SERVE-23 到 SERVE-26：流式、客户端走了、健康与指标、密钥与日志。"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import openai
import psutil
import pytest

import deepseek_export
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.serving import EngineSettings
from deepseek_export.serving.http.health import Pulse
from deepseek_export.serving.http.keys import KeyRing
from deepseek_export.serving.http.server import Server, listen, serve
from deepseek_export.serving.http.service import ServedModel
from tests.serving_http import CHAT, LONG, NAME, TEXT, Running, alone, events, loader, opened, until

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def model(trained_bundle: Path) -> CompiledModel:
    """对照：不经过服务。"""
    return deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture
def model_of(trained_bundle: Path) -> Callable[[], CompiledModel]:
    """另加载一份，归引擎用。"""
    return lambda: deepseek_export.load(trained_bundle, threads=1)


@pytest.fixture(scope="module")
def server(trained_bundle: Path) -> Iterator[Running]:
    """四个 slot。"""
    with Running(loader(trained_bundle, slots=4, queue=64)) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(trained_bundle: Path) -> Iterator[Running]:
    """一个 slot，排一个；注释发得很勤。"""
    with Running(loader(trained_bundle, slots=1, queue=1), keep_alive_s=0.02) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    """官方的客户端，不重试。"""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


# SERVE-23


def test_the_stream_to_the_letter(server: Running, model: CompiledModel):
    """SERVE-23：头一块带角色，然后是文本，结束的原因，用量，``[DONE]``。"""
    body = {
        "messages": CHAT,
        "temperature": 0,
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    got = server.post("/v1/chat/completions", body)
    assert got.headers["content-type"].startswith("text/event-stream")
    chunks = events(got.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * len(chunks[:-1])
    assert usage["choices"] == []
    prompt = len(model.encode(CHAT[0]["content"], chat=True))
    counts = usage["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == (
        prompt,
        6,
        prompt + 6,
    )
    server.idle()
    again = server.post("/v1/chat/completions", body | {"stream": False, "stream_options": None})
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt - 1
    assert "usage" not in events(server.post("/v1/completions", {"prompt": "x", "stream": True}).text)[0]


def test_a_character_over_several_tokens_comes_whole(server: Running, model: CompiledModel):
    """SERVE-23：词表里没有的字要三个 token，流式里它在同一块。"""
    ids = model.encode("甯黌")
    assert len(ids) > 5
    for cut in range(1, 12):
        body = {"prompt": "《秋思》陆游\n", "temperature": 0, "max_tokens": cut, "stream": True}
        pieces = [chunk["choices"][0]["text"] for chunk in events(server.post("/v1/completions", body).text)]
        assert "".join(pieces) == alone(model, body["prompt"], max_new_tokens=cut)
        assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_comments_keep_a_waiting_stream_alive(narrow: Running):
    """SERVE-23：排队的时候也有注释，轮到了照常给文本。"""
    with narrow.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as busy:
        tokens = busy.iter_lines()  # 留着：迭代器没有了，连接就断了
        next(tokens)
        body = {"prompt": TEXT, "max_tokens": 2, "temperature": 0, "stream": True}
        with narrow.client.stream("POST", "/v1/completions", json=body) as waiting:
            lines = waiting.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
            busy.close()
            rest = [line for line in lines if line and not line.startswith(":")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    narrow.idle()


class Failing:
    """前几次照旧，之后一直抛出 ``error``。"""

    def __init__(self, run, times: int, error: BaseException) -> None:
        self._run, self.times, self.error = run, times, error

    def __call__(self, *arguments):
        self.times -= 1
        if self.times < 0:
            raise self.error
        return self._run(*arguments)


def test_an_error_after_the_stream_began_is_an_event(trained_bundle: Path):
    """SERVE-23、SERVE-25：已经开始的流以错误的事件结束，健康检查跟着变，好了又变回来；引擎死了就再也不健康。"""
    model = deepseek_export.load(trained_bundle, threads=1)
    body = {"messages": CHAT, "max_tokens": 50, "ignore_eos": True, "stream": True}
    broken = DsxError("DSX-E513", "假装的", "不必")
    with Running(lambda: opened(model)) as running:
        with mock.patch.object(model.session, "run", Failing(model.session.run, 3, broken)) as failing:
            chunks = events(running.post("/v1/chat/completions", body).text)
            assert "choices" in chunks[-2]
            assert (chunks[-1]["error"]["code"], chunks[-1]["error"]["type"]) == ("DSX-E513", "server_error")
            assert "DSX-E513" in running.get("/health").json()["error"]["message"]
            failing.times = 0
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
                with pytest.raises(openai.InternalServerError, match="DSX-E513"):
                    client.chat.completions.create(model=NAME, messages=CHAT)
                with pytest.raises(openai.APIError, match="DSX-E513"):
                    list(client.chat.completions.create(model=NAME, messages=CHAT, stream=True))
        assert running.post("/v1/chat/completions", body).status_code == 200
        assert running.get("/health").json() == {"status": "ok"}
        dead = Failing(model.session.run, 2, RuntimeError("secret detail"))
        with mock.patch.object(model.session, "run", dead):
            chunks = events(running.post("/v1/chat/completions", body).text)
        assert chunks[-1]["error"]["code"] == "internal_error"
        assert "secret" not in chunks[-1]["error"]["message"]
        sick = running.get("/health")
        assert sick.status_code == 503
        assert "RuntimeError" in sick.text
        refused = running.post("/v1/chat/completions", body)
        assert "secret" not in sick.text + refused.text
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "DSX-E531")
        assert metrics(running)['dsx:request_success_total{finished_reason="error"}'] == 4


# SERVE-24


def test_a_client_that_leaves_a_stream_stops_it(server: Running):
    """SERVE-24"""
    server.idle()
    before, tasks = server.engine.stats.finished["cancelled"], server.tasks()
    with httpx.Client(timeout=60) as client:
        body = LONG | {"stream": True, "n": 2}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    server.idle()
    assert server.engine.stats.finished["cancelled"] == before + 2
    until(lambda: server.tasks() <= tasks)


def test_a_client_that_leaves_before_the_whole_answer_stops_it(server: Running):
    """SERVE-24：不是流式的也停。"""
    server.idle()
    before, tasks = server.engine.stats, server.tasks()
    body = json.dumps(LONG).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        until(lambda: server.engine.stats.generated_tokens > before.generated_tokens + 3)
    server.idle()
    assert server.engine.stats.finished["cancelled"] == before.finished["cancelled"] + 1
    until(lambda: server.tasks() <= tasks)


def test_a_storm_leaves_nothing_behind(server: Running, model: CompiledModel):
    """SERVE-24：答完的、中途走的、写坏的、太长的混着来；答完的都对，请求、任务、线程、文件都没有多。"""
    want = alone(model, TEXT, max_new_tokens=12)
    short = {"prompt": TEXT, "max_tokens": 12, "temperature": 0}
    url = f"{server.url}/v1/completions"

    def whole(client: httpx.Client) -> None:
        assert client.post(url, json=short).json()["choices"][0]["text"] == want

    def stream(client: httpx.Client) -> None:
        chunks = events(client.post(url, json=short | {"stream": True}).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want

    def leave_stream(client: httpx.Client) -> None:
        with client.stream("POST", url, json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())

    def leave_whole(client: httpx.Client) -> None:
        with pytest.raises(httpx.ReadTimeout):
            client.post(url, json=LONG, timeout=httpx.Timeout(60, read=0.05))

    def malformed(client: httpx.Client) -> None:
        assert client.post(url, json=short | {"n": -1}).status_code == 400

    def too_long(client: httpx.Client) -> None:
        assert client.post(url, json={"prompt": [[3], [3] * 3000]}).status_code == 400

    def ask(kind: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(timeout=60) as client:
            kind(client)

    def left() -> tuple[int, int]:
        return server.tasks(), psutil.Process().num_fds()

    server.idle()
    before = left()
    kinds = [whole, stream, leave_stream, leave_whole, malformed, too_long] * 6
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, kinds))
    server.idle()
    until(lambda: all(now <= then for now, then in zip(left(), before, strict=True)))
    assert sum(thread.name == "dsx-load" for thread in threading.enumerate()) == 0


# SERVE-25


def test_health_while_loading_and_after(trained_bundle: Path):
    """SERVE-25：加载中 503，是 llama.cpp 的那个回答；试跑过一个 token 才就绪。"""
    go = threading.Event()

    def slowly():
        go.wait(30)
        return loader(trained_bundle)()

    with Running(slowly, wait=False) as running:
        until(lambda: running.get("/health").status_code == 503)
        error = running.get("/health").json()["error"]
        assert (error["code"], error["message"], error["type"]) == (503, "Loading model", "unavailable_error")
        assert running.get("/ready").status_code == 503
        assert running.get("/v1/models").status_code == 503
        assert running.post("/v1/completions", {"prompt": "x"}).status_code == 503
        assert "dsx:num_requests_running" not in running.get("/metrics").text
        go.set()
        until(lambda: running.get("/ready").status_code == 200)
        assert running.engine.stats.generated_tokens == 2  # 算一次提示词，生成一次
        assert running.get("/health").json() == {"status": "ok"}


def metrics(server: Running, model: str = NAME) -> dict[str, float]:
    """``/metrics`` 里这个模型的各项，名字里去掉 ``model_name``。"""
    label = f'model_name="{model}"'
    lines = [line for line in server.get("/metrics").text.splitlines() if label in line]
    bare = (re.sub(rf"{label},?|,{label}", "", line).replace("{}", "") for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in bare)}


def test_metrics(server: Running):
    """SERVE-25：vLLM 的名字，``dsx:`` 开头；数与引擎的、请求的对得上。"""

    def readings() -> dict[str, float]:
        return metrics(server)

    server.idle()
    before = readings()
    got = server.post("/v1/completions", {"prompt": TEXT, "max_tokens": 9, "temperature": 0}).json()
    server.idle()
    after = readings()

    def grew(name: str) -> float:
        return after[f"dsx:{name}"] - before[f"dsx:{name}"]

    assert grew("generation_tokens_total") == 9
    assert grew("prompt_tokens_total") == grew("prefix_cache_queries_total") == got["usage"]["prompt_tokens"]
    assert grew("prefix_cache_hits_total") == got["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert grew("spec_decode_num_accepted_tokens_total") <= grew("spec_decode_num_draft_tokens_total")
    assert grew("spec_decode_num_drafts_total") == 0 or server.engine.settings.num_drafts
    assert grew("time_to_first_token_seconds_count") == grew("e2e_request_latency_seconds_count") == 1
    assert grew("inter_token_latency_seconds_count") <= 8
    assert grew('request_success_total{finished_reason="length"}') == 1
    assert after["dsx:num_requests_running"] == after["dsx:num_requests_waiting"] == 0


def test_health_recovers_by_itself(model_of: Callable[[], CompiledModel], caplog):
    """SERVE-25：模型调用失败过就是 503；探针自己会试跑，好了就是 200，不必等别人的请求。"""
    model = model_of()
    with Running(lambda: opened(model)) as running:
        broken = DsxError("DSX-E513", "坏了", "修")
        with mock.patch.object(model.session, "run", side_effect=broken):
            assert running.post("/v1/completions", {"prompt": TEXT}).status_code == 500
            for _ in range(3):
                got = running.get("/health")
                assert (got.status_code, got.json()["error"]["code"]) == (503, "engine_dead")
                assert "DSX-E513" in got.json()["error"]["message"]
                assert "坏了" not in got.text  # 探针不要密钥，不说原文
                running.idle()
        assert running.get("/ready").status_code == 503  # 这一问开始试跑
        until(lambda: running.get("/ready").status_code == 200)
        assert running.get("/health").status_code == 200


def test_health_sees_a_stuck_engine(model_of: Callable[[], CompiledModel]):
    """SERVE-25：有事做而许久没有做完一次模型调用，是 503；动了就好了。"""
    model = model_of()
    go = threading.Event()
    run = model.session.run

    def stuck(*arguments):
        go.wait(30)
        return run(*arguments)

    with model.engine(EngineSettings(slots=1)) as engine:
        pulse = Pulse(engine, [5], stall_s=0.05)
        assert pulse.trouble() is None
        time.sleep(0.1)  # 闲着的不算卡住，隔多久才有人问都一样
        with mock.patch.object(model.session, "run", stuck):
            request = engine.submit([5, 9], max_new_tokens=4)
            until(lambda: engine.stats.running)
            assert pulse.trouble() is None
            until(lambda: "卡住了" in (pulse.trouble() or ""))
            go.set()
            request.result(30)
        assert pulse.trouble() is None


def test_several_models(trained_bundle: Path, model: CompiledModel):
    """SERVE-53：都列出来，请求里的 ``model`` 说要哪一个；健康要全部的；指标各记各的。"""
    one, two = (
        lambda name=name: opened(deepseek_export.load(trained_bundle, threads=1), name) for name in "ab"
    )
    with Running(one, more=[two]) as running:
        assert [card["id"] for card in running.get("/v1/models").json()["data"]] == ["a", "b"]
        want = alone(model, TEXT, max_new_tokens=6)
        body = {"prompt": TEXT, "max_tokens": 6, "temperature": 0}
        for name, times in (("a", 1), ("b", 2)):
            for _ in range(times):
                got = running.post("/v1/completions", body | {"model": name}).json()
                assert (got["model"], got["choices"][0]["text"]) == (name, want)
        assert running.post("/v1/completions", body).json()["error"]["param"] == "model"
        assert running.post("/v1/completions", body | {"model": "c"}).status_code == 404
        assert running.post("/tokenize", {"prompt": "x", "model": "b"}).status_code == 200
        assert running.post("/detokenize", {"tokens": [5]}).status_code == 400
        for name, times in (("a", 1), ("b", 2)):
            read = metrics(running, name)
            assert read["dsx:e2e_request_latency_seconds_count"] == times
            assert read["dsx:generation_tokens_total"] == 6 * times + 2  # 试跑的也算
        models = running.server.service.models
        models["b"].engine.close()
        got = running.get("/health")
        assert got.status_code == 503
        assert "'b'" in got.json()["error"]["message"]


def test_one_model_that_cannot_load_stops_all(trained_bundle: Path):
    """SERVE-53：加载好的也关掉。"""
    loaded: list[ServedModel] = []

    def good() -> ServedModel:
        loaded.append(opened(deepseek_export.load(trained_bundle, threads=1)))
        return loaded[0]

    def bad() -> ServedModel:
        raise DsxError("DSX-E402", "没有", "给一个")

    server = Server([good, bad])
    with listen("127.0.0.1", 0) as listening, pytest.raises(DsxError, match="DSX-E402"):
        serve(server, listening)
    assert not loaded[0].engine.healthy


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_stopped_as_it_gets_ready(trained_bundle: Path, late: float):
    """SERVE-27：正在加载、恰好加载完的时候停下，引擎也关掉。"""
    loaded: list[ServedModel] = []

    def load() -> ServedModel:
        loaded.append(opened(deepseek_export.load(trained_bundle, threads=1)))
        server.should_exit = True
        time.sleep(late)
        return loaded[0]

    server = Server([load])
    with listen("127.0.0.1", 0) as listening:
        serve(server, listening)
    until(lambda: not loaded[0].engine.healthy)


# SERVE-26


def test_keys_and_logs(trained_bundle: Path, caplog):
    """SERVE-26：没有密钥 401，探针除外；跨域缺省是关的；一个请求一行日志，没有提示词、回答与密钥。"""
    caplog.set_level("INFO", "dsx.serve")
    secret = "sk-very-secret"
    with Running(loader(trained_bundle), keys=KeyRing([secret, "other"])) as running:
        assert running.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version"):
            assert running.get(path).status_code == 401
        wrong = ("", "Bearer", "Bearer nope", f"Basic {secret}", secret, f"Bearer {secret}x", "Bearer \xff")
        for value in wrong:
            got = running.get("/v1/models", headers={"authorization": value.encode("latin-1")})
            assert (got.status_code, got.json()["error"]["type"]) == (401, "authentication_error")
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=secret, max_retries=0) as client:
            got = client.completions.create(model=NAME, prompt="PROMPT-TEXT", max_tokens=2)
            assert client.models.list().data
        caplog.clear()
        headers = {
            "authorization": "Bearer other",
            "x-request-id": "mine-1",
            "origin": "https://evil.example",
        }
        got = running.post("/v1/completions", {"prompt": "PROMPT-TEXT", "max_tokens": 2}, headers=headers)
        assert got.headers["x-request-id"] == "mine-1"
        assert "access-control-allow-origin" not in got.headers
        running.get("/a%0Ab", headers={"authorization": "Bearer other", "x-request-id": "two words"})
        until(lambda: len(caplog.records) == 2)
    first, second = (record.getMessage() for record in caplog.records[:2])
    assert first.startswith("mine-1 POST /v1/completions 200 model=demo prompt=")
    assert "new=2 finish=length ttft=" in first
    assert " GET /a%0Ab 404 " in second
    assert not second.startswith("two words")
    assert not any(word in caplog.text for word in ("PROMPT-TEXT", secret, "other"))


def test_prompts_are_logged_only_on_request(trained_bundle: Path, caplog):
    """SERVE-26：要了才写，仍是一行，看不见的字符都转义；回答从不写。"""
    caplog.set_level("INFO", "dsx.serve")
    with Running(loader(trained_bundle), log_prompts=True) as running:
        caplog.clear()
        body = {"prompt": ["明月\n\x1b[31m\u2028", "x"], "max_tokens": 2}
        assert running.post("/v1/completions", body).status_code == 200
        until(lambda: caplog.records)
    line = caplog.records[0].getMessage()
    assert line.isprintable()
    assert "明月\\n" in line


def test_cors_only_where_allowed(trained_bundle: Path):
    """SERVE-26：允许的网页可以带着密钥来，预检不要密钥；别的网页不行。"""
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with Running(
        loader(trained_bundle), keys=KeyRing(["k"]), cors_origins=["https://good.example"]
    ) as running:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            got = running.client.options("/v1/completions", headers=preflight | {"origin": origin})
            assert (got.headers.get("access-control-allow-origin") == origin) is allowed
