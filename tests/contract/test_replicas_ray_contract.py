"""specs/cluster 的 CLUSTER-50、CLUSTER-51、CLUSTER-52：真的 Ray，两个节点，都在本机上；杀东西。"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import deepseek_export
from deepseek_export.cli.demo import CHECKPOINT
from tests.contract.test_batch_contract import answers, line, texts, written
from tests.integration.cli import DSX, dsx, environment
from tests.serving_http import until
from tests.stages import alive

pytestmark = [pytest.mark.contract, pytest.mark.slow]

BODY = {"prompt": "床前明月光", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """两个节点，各四个 CPU。"""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 4, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas-ray")
    return deepseek_export.export(CHECKPOINT, folder / "out", "mla").path


def status(address: str) -> dict[str, Any]:
    """``dsx cluster status``，另开一个进程。"""
    done = subprocess.run(
        [*DSX, "cluster", "status", "--ray", address, "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["ray"]
    return found


def empty(address: str) -> bool:
    """dsx 的什么也没有留下，资源都还了。"""
    found = status(address)
    return not (found["groups"] or found["stages"] or found["replicas"]) and found["free"]["CPU"] == 8


def running(address: str) -> int:
    """Ray Serve 上在跑的，入口也算。"""
    return sum(one["states"].get("RUNNING", 0) for one in status(address)["replicas"])


def test_batch_on_a_pool(address, bundle, tmp_path):
    """CLUSTER-51：发起的一端被 kill -9、一个副本被 kill -9、一个被停住，再运行一次接着做；与不用 Ray 的逐字相同，什么也没有留下。"""
    prompts = ["床前明月光", "And it came to pass", "学而时习之"]
    lines = [
        line(f"r{n}", prompt=prompts[n % 3], max_tokens=60, temperature=0, ignore_eos=True) for n in range(60)
    ]
    source, out = written(tmp_path, lines), tmp_path / "out.jsonl"
    command = ["batch", str(bundle), str(source), "-o", str(out), "--slots", "1", "--threads", "1"]
    command += ["--ray", address, "--replicas", "2"]
    running = subprocess.Popen([*DSX, *command], env=environment())
    partial = tmp_path / "out.jsonl.partial"
    until(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 2, 240)
    assert len(status(address)["groups"]) == 2
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists()
    until(lambda: empty(address), 120)
    done = partial.read_bytes().count(b"\n")

    again, struck = subprocess.Popen([*DSX, *command], env=environment()), list[int]()
    try:
        until(lambda: partial.read_bytes().count(b"\n") > done, 240)
        struck += workers()
        first, second = struck
        os.kill(first, signal.SIGKILL)
        os.kill(second, signal.SIGSTOP)
        assert again.wait(500) == 0
        assert alive(struck) == []
    finally:  # 不成也不占着别的测试要的资源
        again.kill()
        again.wait()
        for pid in alive(struck):
            os.kill(pid, signal.SIGKILL)
    found = answers(out)
    assert [one["custom_id"] for one in found] == [f"r{n}" for n in range(60)]
    whole = tmp_path / "whole.jsonl"
    assert dsx("batch", bundle, source, "-o", whole, "--threads", "1").returncode == 0
    assert texts(out) == texts(whole)
    until(lambda: empty(address), 120)


def test_batch_on_replicas_of_stages(address, bundle, tmp_path):
    """CLUSTER-51：没有切开的切成两个 stage，两个副本各有一套：与一个进程逐字相同。"""
    source = written(tmp_path, [line(f"r{n}", **{**BODY, "prompt": f"{n} 床前"}) for n in range(8)])
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = [*DSX, "batch", str(bundle), str(source), "-o", str(out), "--stages", "2", "--slots", "1"]
    command += ["--ray", address, "--replicas", "2"]
    subprocess.run(command, env=environment(), timeout=400, check=True)
    assert dsx("batch", bundle, source, "-o", whole, "--threads", "1").returncode == 0
    assert texts(out) == texts(whole)
    until(lambda: empty(address), 120)


def workers(kind: str = "_Actor") -> list[int]:
    """这里的两个节点上，Ray 的某种 actor 的进程号；同一台机器上别的 Ray 的不算。"""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and kind in title:
            found.append(process.pid)
    return found


class Serving:
    """开着的 ``dsx serve --replicas``。"""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.client = httpx.Client(base_url=url, timeout=120)

    def ask(self, **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={**BODY, **more})


@contextmanager
def serving(*arguments: object) -> Iterator[Serving]:
    command = [*DSX, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for text in process.stderr or ():
            said.append(text)
            if "就绪" in text:
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        until(lambda: ready.is_set() or process.poll() is not None, 300)
        assert process.poll() is None, "".join(said)
        (url,) = re.findall(r"在 (http://\S+) 监听", "".join(said))
        yield Serving(process, url)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(120)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def want(bundle: Path) -> str:
    model = deepseek_export.load(bundle, 1)
    result = model.generate(BODY["prompt"], 16, ignore_eos=True)
    assert result.text is not None
    return result.text[0]


def test_serve_with_two_replicas_of_two_stages(address, bundle, want):
    """CLUSTER-50、CLUSTER-52：``--stages 2 --replicas 2``：同样的 token；一个副本的 stage 被杀，别的接着答，``/health`` 一直好；停下什么也没有留下。"""
    with serving(bundle, "--ray", address, "--stages", 2, "--replicas", 2, "--slots", 2) as server:
        assert server.ask().json()["choices"][0]["text"] == want
        again = server.ask().json()
        assert again["choices"][0]["text"] == want
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0  # 去了同一个副本
        found = status(address)
        assert [(one["index"], one["state"]) for one in found["stages"]] == [
            (index, "running") for _ in range(2) for index in range(2)
        ]
        assert running(address) == 3
        assert len(found["groups"]) == 2
        assert all(len(group["bundles"]) == 3 for group in found["groups"])
        labels = set(re.findall(r'replica="(\w+)"', server.client.get("/metrics").text))
        assert len(labels) == 2
        for victim in (found["stages"][0], found["stages"][2]):
            os.kill(victim["pid"], signal.SIGKILL)
            for number in range(12):
                answer = server.ask(prompt=f"{number} 床前明月光")
                assert answer.status_code == 200, answer.text
                assert server.client.get("/health").status_code == 200
            until(lambda: {one["state"] for one in status(address)["stages"]} == {"running"}, 120)
            assert server.ask().json()["choices"][0]["text"] == want
        pids = [one["pid"] for one in status(address)["stages"]]
        assert len(alive(pids)) == 4
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 143
    until(lambda: alive(pids) == [], 30)
    until(lambda: empty(address), 120)


def test_a_killed_replica_and_a_killed_dsx(address, bundle, want):
    """CLUSTER-52：副本的进程被杀、被停住，别的接着答，它由 Ray Serve 换掉；``dsx serve`` 被 kill -9，副本与 Ray Serve 都停下。"""
    with serving(bundle, "--ray", address, "--replicas", 2, "--slots", 2) as server:
        assert server.ask().json()["choices"][0]["text"] == want
        (first, *_) = workers("ServeReplica:dsx:out:model")
        os.kill(first, signal.SIGKILL)
        for number in range(12):
            answer = server.ask(prompt=f"{number} 床前明月光")
            assert answer.status_code == 200, answer.text
        until(lambda: len(workers("ServeReplica:dsx:out:model")) == 2, 120)
        until(lambda: running(address) == 3, 120)
        (frozen, *_) = workers("ServeReplica:dsx:out:model")
        os.kill(frozen, signal.SIGSTOP)
        for number in range(6):
            assert server.ask(prompt=f"{number} 学而时习之").status_code == 200
        try:
            others = {frozen, *workers("ServeReplica:dsx:out:model")}
            until(lambda: set(workers("ServeReplica:dsx:out:model")) - others, 200)
            until(lambda: running(address) == 3, 120)
        finally:
            if alive([frozen]):  # Ray 不一定杀得掉停着的
                os.kill(frozen, signal.SIGKILL)
        second = subprocess.run(
            [*DSX, "serve", str(bundle), "--ray", address, "--replicas", "1", "--port", "0"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert second.returncode == 1
        assert "DSX-E753" in second.stderr
        server.process.kill()
        server.process.wait()
        until(lambda: empty(address), 120)


def test_one_that_cannot_load_is_told(address, bundle, tmp_path):
    """CLUSTER-52：一个 stage 的权重坏了，副本加载不了：说它自己的原因，什么也没有留下。"""
    stages = deepseek_export.split(bundle, tmp_path / "stages", 2)
    manifest = json.loads((stages.directories[1] / "manifest.json").read_text(encoding="utf-8"))
    weights = stages.directories[1] / manifest["weights"]["files"][0]
    content = weights.read_bytes()
    weights.unlink()  # 也许与别的 stage 是同一个文件
    weights.write_bytes(content[:-8])
    done = subprocess.run(
        [*DSX, "serve", str(stages.path), "--ray", address, "--replicas", "1", "--port", "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 1
    assert "DSX-E755" in done.stderr
    assert "DSX-E406" in done.stderr
    until(lambda: empty(address), 120)


def test_more_replicas_when_there_is_more_to_do(address, bundle):
    """CLUSTER-52：``--replicas 1-2``：先起一个，请求多了再起一个。"""
    with serving(bundle, "--ray", address, "--replicas", "1-2", "--slots", 2) as server:
        assert running(address) == 2  # 入口与一个副本
        enough = threading.Event()

        def keep_asking(number: int) -> None:
            while not enough.is_set():
                answer = server.ask(prompt=f"{number} 床前明月光", max_tokens=200)
                assert answer.status_code == 200

        askers = [threading.Thread(target=keep_asking, args=(number,)) for number in range(4)]
        for one in askers:
            one.start()
        try:
            until(lambda: running(address) == 3, 240)
        finally:
            enough.set()
            for one in askers:
                one.join()
