"""服务的测量：请求由种子定，闭环不吞错误，量的是真的服务与真的引擎。"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.checkpoint.synthetic import write_checkpoint
from perf.servers import contenders
from perf.servers.contenders import LLAMA_SERVER, Local, ServerProcess, dsx_serve, find_llama_server
from perf.servers.load import Heard, Job, closed_loop, jobs, over_http
from perf.servers.words import word, write_tokenizer
from tests.contract.test_mtp_contract import SMALL

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perf-serve")
    checkpoint = write_checkpoint(folder / "ck", SMALL, dtype="float32")
    write_tokenizer(checkpoint, SMALL["vocab_size"])
    return deepseek_export.export(checkpoint, folder / "out", "mla").path


def test_jobs_come_from_the_seed() -> None:
    one, two = (jobs(20, (3, 9), (2, 5), 50, seed) for seed in (0, 1))
    assert one == jobs(20, (3, 9), (2, 5), 50, 0) != two
    assert {len(job.prompt) for job in one} <= set(range(3, 10))
    assert {job.new_tokens for job in one} == {2, 3, 4, 5}


def test_closed_loop_counts_every_job_and_hides_no_failure() -> None:
    todo = jobs(9, (3, 9), (2, 5), 50, 0)
    asked: list[Job] = []

    def ask(job: Job) -> Heard:
        asked.append(job)
        return Heard(0.0, [0.5 + 0.25 * index for index in range(job.new_tokens)], job.new_tokens)

    measured = closed_loop(ask, todo, clients=4)
    assert sorted(map(id, asked)) == sorted(map(id, todo))
    assert measured.tokens == sum(job.new_tokens for job in todo)
    assert (measured.first_s, measured.gap_p50_s, measured.gap_p95_s) == (0.5, 0.25, 0.25)
    in_one_piece = closed_loop(lambda job: Heard(0.0, [0.5], job.new_tokens), todo, clients=2)
    assert (in_one_piece.gap_p50_s, in_one_piece.gap_p95_s) == (None, None)
    with pytest.raises(RuntimeError, match="得到 1 个"):
        closed_loop(lambda job: Heard(0.0, [0.1], 1), todo, clients=2)


@pytest.mark.heavy
def test_the_server_and_the_engine_answer_the_same_load(bundle: Path) -> None:
    """经 HTTP 与不经 HTTP，给的 token 数都是要的。"""
    todo = jobs(4, (3, 9), (3, 6), SMALL["vocab_size"], 0)
    local = Local(str(bundle), threads=1, slots=2)
    assert local.closed_loop([asdict(job) for job in todo])["tokens"] == sum(job.new_tokens for job in todo)
    assert local.generator_step(4, 6) > 0
    assert local.engine_step(4, 100) > 0
    with pytest.raises(RuntimeError, match="太少"):
        local.engine_step(4, 1)
    with dsx_serve(bundle, threads=1, slots=2) as server:
        ask = over_http(server.url, "bench")
        heard = ask(todo[0])
        assert 1 <= len(heard.arrivals) <= heard.tokens == todo[0].new_tokens
        assert closed_loop(ask, todo, clients=2).tokens == sum(job.new_tokens for job in todo)
        with pytest.raises(RuntimeError, match="HTTP 400"):
            ask(Job([SMALL["vocab_size"]], 1))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="DSX-E"):
        dsx_serve(tmp_path / "nothing", threads=1, slots=1)


def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_READY_S", 0.5)
    with pytest.raises(RuntimeError, match="还没有就绪"):
        ServerProcess(["sleep", "60"], 1, "/health")


def test_llama_server_is_found_by_name_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.delenv(LLAMA_SERVER, raising=False)
    with pytest.raises(FileNotFoundError, match=LLAMA_SERVER):
        find_llama_server()
    program = tmp_path / "elsewhere"
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv(LLAMA_SERVER, os.fspath(program))
    assert find_llama_server() == os.fspath(program)


def test_words_differ() -> None:
    assert len({word(token) for token in range(1000)}) == 1000
