"""一套 stage 的测量：一个进程与流水线走的是同一步，出的事真的出了，慢不算断。"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

import deepseek_export
from deepseek_export.backend.base import CachesLost
from deepseek_export.benchmark.spread import Spread
from perf.suites import cluster
from perf.workload.faults import Faulted
from perf.workload.faulty import FaultyEdges
from perf.workload.pipelines import Alone, Pipeline, until
from tests.stages import write_five

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perf-cluster")
    bundle = deepseek_export.export(write_five(folder / "ck"), folder / "out", "mla").path
    return deepseek_export.split(bundle, folder / "stages", 2).path


def _alone(path: str) -> None:
    assert Alone(path, 1, cluster.cores()[:1], rows=3, context=8, parts=2).step(2) > 0


@pytest.mark.heavy
def test_both_sides_take_the_same_step(stages: Path) -> None:
    """钉核改的是整个进程，所以一个进程的那一边在子进程里。"""
    child = multiprocessing.get_context("spawn").Process(target=_alone, args=(str(stages.with_name("out")),))
    child.start()
    pipeline = Pipeline(str(stages), cluster.cores(), rows=3, context=8, parts=3)
    assert pipeline.step(2) > 0
    assert pipeline.restart() > 0
    with pytest.raises(CachesLost):  # 说一次，之后就是新的
        pipeline.step(1)
    assert pipeline.step(1) > 0
    child.join()
    assert child.exitcode == 0


@pytest.mark.heavy
def test_faults_really_happen(stages: Path) -> None:
    with Faulted(str(stages), clients=3, new_tokens=6) as faulted:
        slow = faulted.suffer("递得慢")
        assert set(slow) == {"longest_s"}
        killed = faulted.suffer("SIGKILL")
    assert killed["restart_s"] > 0
    assert killed["longest_s"] > 0


def test_edges_misbehave_as_asked() -> None:
    edges = FaultyEdges()
    sender, receiver = edges.link()
    receiver.settimeout(20)
    with sender, receiver:
        sender.sendall(b"ab")
        assert receiver.recv(2) == b"ab"
        edges.modes[0] = "corrupt"
        sender.sendall(b"ab")
        assert receiver.recv(2) == b"a\x22"
        edges.modes[0] = "cut"
        sender.sendall(b"ab")
        assert receiver.recv(2) == b""


def test_a_wait_has_an_end() -> None:
    with pytest.raises(RuntimeError, match="等了 0 秒"):
        until(lambda: False, 0.01)


def test_differences_are_paired() -> None:
    longer, shorter = Spread.of([3.0, 5.0, 9.0]), Spread.of([1.0, 2.0, 3.0])
    assert np.allclose(cluster.difference(longer, shorter, 0.5).samples, [1.0, 1.5, 3.0])
