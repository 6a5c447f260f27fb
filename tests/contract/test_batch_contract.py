"""specs/cluster 的批量：次序、失败的行、被杀之后接着做。"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import deepseek_export
from deepseek_export.bundle.lock import locked
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.serving import batch
from deepseek_export.serving.batch import MAX_LINE, BatchReport, run_batch
from tests.engines import refused
from tests.integration.cli import DSX, dsx, environment
from tests.serving_http import until

pytestmark = pytest.mark.contract

COMPLETION = "/v1/completions"


def line(name: str, url: str = COMPLETION, method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": method, "url": url, "body": body})


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


class Echo:
    """记下问了什么，原样答回去；``later`` 里的慢一些，``busy`` 里的先答几次 503。"""

    def __init__(self, later: tuple[str, ...] = (), busy: dict[str, int] | None = None) -> None:
        self.asked: list[str] = []
        self.now = self.most = 0
        self._later, self._busy = later, dict(busy or {})

    async def __call__(self, url: str, body: bytes) -> tuple[int, bytes]:
        name = json.loads(body)["prompt"]
        self.asked.append(name)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02 if name in self._later else 0)
        self.now -= 1
        if self._busy.get(name, 0):
            self._busy[name] -= 1
            return 503, b"{}"
        if name == "boom":
            raise RuntimeError("boom")
        status = 400 if name == "bad" else 200
        return status, json.dumps({"said": name, "url": url}).encode()


def written(folder: Path, lines: list[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_order_and_refused_lines(tmp_path):
    """CLUSTER-13：先做完的等前面的；读不懂的行各有错误，别的照做；至多 concurrency 个同时做。"""
    names = [f"r{number}" for number in range(30)]
    lines = [line(name, prompt=name) for name in names]
    lines[3:3] = ["", "   "]
    odd = [
        ("not json", "invalid_json"),
        ("[1]", "invalid_line"),
        ('{"url": "/v1/completions"}', "invalid_line"),
        (line("get", method="GET", prompt="x"), "invalid_url"),
        (line("else", url="/v1/files", prompt="x"), "invalid_url"),
        (line("stream", prompt="x", stream=True), "invalid_body"),
        (json.dumps({"custom_id": "text", "method": "POST", "url": COMPLETION, "body": "x"}), "invalid_body"),
        (line("long", prompt="x" * MAX_LINE), "line_too_long"),
        ("[" * 100_000, "invalid_json"),
        (line("bad", prompt="bad"), None),
    ]
    source = written(tmp_path, [*lines[:10], *(text for text, _ in odd), *lines[10:]])
    echo = Echo(later=("r0", "r7", "r20"))
    report = run_batch(source, tmp_path / "out.jsonl", echo, model="m", concurrency=4)
    assert report == BatchReport(40, 10, 0)
    found = answers(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == [f"batch_req_{number}" for number in range(40)]
    good = [one for one in found if one["response"] is not None and one["response"]["status_code"] == 200]
    assert [one["custom_id"] for one in good] == names
    assert [one["response"]["body"]["said"] for one in good] == names
    assert [one["error"]["code"] for one in found if one["error"]] == [code for _, code in odd if code]
    assert [
        one["custom_id"] for one in found if one["response"] and one["response"]["status_code"] == 400
    ] == ["bad"]
    assert echo.most <= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_model_that_restarts_is_waited_for(tmp_path, monkeypatch):
    """CLUSTER-13：503 过一会儿再试；一直不行的那一行记下 503。"""
    monkeypatch.setattr(batch, "_RETRY_S", 0.001)
    source = written(tmp_path, [line(name, prompt=name) for name in ("a", "b", "c")])
    report = run_batch(source, tmp_path / "out", Echo(busy={"b": 3, "c": 10**9}), model="m")
    assert report == BatchReport(3, 1, 0)
    assert [one["response"]["status_code"] for one in answers(tmp_path / "out")] == [200, 200, 503]


@pytest.mark.parametrize("torn", [b"", b'{"id": "batch_req_', b'{"id": "batch_req_9"}'])
def test_going_on_where_it_stopped(tmp_path, torn):
    """CLUSTER-14：做到一半出了错，再来一次只做剩下的；写了一半的最后一行重做。"""
    names = [f"r{number}" for number in range(12)]
    source = written(tmp_path, [line(name, prompt=name) for name in [*names[:7], "boom", *names[7:]]])
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="boom"):
        run_batch(source, out, Echo(), model="m", concurrency=2)
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    done = len(answers(partial))
    assert 0 < done <= 7
    with partial.open("ab") as file:
        file.write(torn)
    refused("DSX-E750", lambda: run_batch(source, out, Echo(), model="another"))
    echo = Echo()

    async def calm(url: str, body: bytes) -> tuple[int, bytes]:
        return await echo(url, body.replace(b"boom", b"bang"))

    report = run_batch(source, out, calm, model="m", concurrency=2)
    assert report == BatchReport(13, 0, done)
    assert [one["id"] for one in answers(out)] == [f"batch_req_{number}" for number in range(13)]
    assert len(echo.asked) == 13 - done
    refused("DSX-E401", lambda: run_batch(source, out, echo, model="m"))


def test_another_input_is_not_mixed_in(tmp_path):
    """CLUSTER-14：输入变了不接着写；``--overwrite`` 从头做；别人正在写就拒绝；输入不是普通文件就拒绝。"""
    source, out = written(tmp_path, [line("a", prompt="a"), line("boom", prompt="boom")]), tmp_path / "out"
    with pytest.raises(RuntimeError):
        run_batch(source, out, Echo(), model="m", concurrency=1)
    source = written(tmp_path, [line("b", prompt="b")])
    refused("DSX-E750", lambda: run_batch(source, out, Echo(), model="m"))
    assert run_batch(source, out, Echo(), model="m", overwrite=True) == BatchReport(1, 0, 0)
    refused("DSX-E750", lambda: run_batch(tmp_path / "none", tmp_path / "new", Echo(), model="m"))
    refused("DSX-E401", lambda: run_batch(source, tmp_path, Echo(), model="m", overwrite=True))
    with locked(tmp_path / "busy"):
        refused("DSX-E411", lambda: run_batch(source, tmp_path / "busy", Echo(), model="m"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    return deepseek_export.export(CHECKPOINT, folder / "out", "mla").path


def texts(path: Path) -> list[Any]:
    return [one["response"]["body"]["choices"][0]["text"] for one in answers(path)]


@pytest.mark.heavy
def test_killed_and_run_again(bundle, tmp_path):
    """CLUSTER-13、CLUSTER-14：真的 ``dsx batch`` 被 kill -9 之后再运行，文本与一次做完的相同；一套 stage 也收。"""
    prompts = ["床前明月光", "And it came to pass", "学而时习之"]
    lines = [
        line(f"r{number}", prompt=prompts[number % 3], max_tokens=60, temperature=0, ignore_eos=True)
        for number in range(24)
    ]
    source, out = written(tmp_path, lines), tmp_path / "killed.jsonl"
    command = [*DSX, "batch", str(bundle), str(source), "-o", str(out), "--slots", "2", "--threads", "1"]
    running = subprocess.Popen(
        command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    partial = tmp_path / "killed.jsonl.partial"
    until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 2, 120)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    done = partial.read_bytes().count(b"\n")
    again = dsx("batch", bundle, source, "-o", out, "--slots", "2", "--threads", "1", "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout.splitlines()[-1])
    assert (told["lines"], told["failed"], told["resumed"]) == (24, 0, done)
    stages = deepseek_export.split(bundle, tmp_path / "stages", 2)
    whole = tmp_path / "whole.jsonl"
    straight = dsx("batch", stages.path, source, "-o", whole, "--slots", "2", "--threads", "1")
    assert straight.returncode == 0, straight.stderr
    assert texts(out) == texts(whole)
    assert [one["custom_id"] for one in answers(out)] == [f"r{number}" for number in range(24)]


@pytest.mark.heavy
def test_a_failed_line_is_the_exit_code(bundle, tmp_path):
    """CLUSTER-13：有一行没有得到回答，退出码是 1；输入不对在加载之前就说。"""
    source = written(tmp_path, [line("ok", prompt="a", max_tokens=1), line("no", prompt=[], max_tokens=1)])
    done = dsx("batch", bundle, source, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "2 行，1 行没有得到回答" in done.stdout
    (bad,) = (one for one in answers(tmp_path / "out.jsonl") if one["response"]["status_code"] != 200)
    assert bad["custom_id"] == "no"
    assert dsx("batch", bundle, tmp_path / "none", "-o", tmp_path / "x").returncode == 1
